"""Comparison of an engine's accumulators with the int64 reference, for every layer and step of a packed network.

Inputs are random and wide enough to reach both ends of every code range. Each step of the tables is compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dqtool.nn.integer import IntegerLayer, accumulate, integer_layer
from dqtool.nn.packed_layer import PackedLayer

__all__ = ["ENGINES", "count_cpu", "count_openvino"]

ROWS = 3
SIZE = (5, 6)


def count_cpu(network: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Yield (layer, accumulators compared, accumulators that differ) for the `cpu` runtime.

    Layers that the runtime computes in float are left out.
    """
    from dqtool.runtimes.cpu import choose_product
    from dqtool.runtimes.cpu.codes import CurrentStep

    for name, form in _layers(network):
        assert form.input is not None
        current_step = CurrentStep()
        product = choose_product(form, current_step)
        if product is None:
            continue
        compared = different = 0
        for step in range(form.input.steps):
            current_step.row = step
            x = _input(form, step)
            expected = accumulate(form.codes(x, step), form)
            got = product.accumulators(product.quantize(x)).to(torch.int64)
            compared += expected.numel()
            different += int((got != expected).sum())
        yield name, compared, different


def count_openvino(network: nn.Module) -> Iterator[tuple[str, int, int]]:
    """Yield (layer, accumulators compared, accumulators that differ) for the `openvino` runtime.

    One graph holds all layers, with the steps along the batch. OpenVINO returns accumulators as float32, so that the
    reference is rounded to float32 before the comparison.
    """
    import openvino

    from dqtool.formats.openvino import OpenVINOProduct, compile_settings, saturates, to_openvino
    from dqtool.nn.traceable import TraceableLayer
    from dqtool.nn.traceable_codes import StepTables

    timesteps: Tensor = network.timesteps  # type: ignore[assignment]
    steps = len(timesteps)
    tables, product = StepTables(timesteps), OpenVINOProduct(saturates())
    names = [name for name, _ in _layers(network)]
    traceable = [TraceableLayer(network.get_submodule(name), tables, product) for name in names]  # type: ignore[arg-type]
    tables.freeze()

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tables, self.layers = tables, nn.ModuleList(traceable)

        def forward(self, timestep: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            self.tables.enter(timestep)
            outputs = []
            for layer, x in zip(traceable, inputs, strict=True):
                ones = torch.ones(layer.weight.shape[0])
                outputs.append(product.layer(layer.quantize(x), layer.weight, ones, layer.form))
            self.tables.leave()
            return tuple(outputs)

    inputs = [torch.cat([_input(layer.form, step)[:1] for step in range(steps)]) for layer in traceable]
    model = to_openvino(Probe().eval(), (timesteps, *inputs))
    compiled = openvino.Core().compile_model(model, "CPU", compile_settings())
    results = compiled([timesteps.numpy(), *(x.numpy() for x in inputs)])
    for index, (name, layer, x) in enumerate(zip(names, traceable, inputs, strict=True)):
        form = layer.form
        assert form.input is not None
        expected = torch.cat([accumulate(form.codes(x[t : t + 1], t), form) for t in range(steps)])
        if not form.input.signed:  # the engine multiplies stored codes
            zero = form.input.zero_point.expand(steps).view(-1, *(1,) * (expected.dim() - 1)).long()
            expected = expected + zero * form.weight_sum.view(
                1, -1, *(1,) * (expected.dim() - 2) if form.is_conv else ()
            )
        got = torch.from_numpy(results[compiled.outputs[index]])
        yield name, expected.numel(), int((got != expected.to(torch.float32)).sum())


ENGINES = {"cpu": count_cpu, "openvino": count_openvino}


def _layers(network: nn.Module) -> Iterator[tuple[str, IntegerLayer]]:
    for name, module in network.named_modules():
        if isinstance(module, PackedLayer):
            form = integer_layer(module)
            if form.is_integer:
                yield name, form


def _input(form: IntegerLayer, step: int) -> Tensor:
    """Return a random input, `[ROWS, C, H, W]` or `[ROWS, 3, C]`, that exceeds both ends of the code range in places."""
    assert form.input is not None
    channels = form.weight.shape[1] * form.groups
    shape = (ROWS, channels, *SIZE) if form.is_conv else (ROWS, 3, channels)
    generator = torch.Generator().manual_seed(step)
    row = form.input.row(step)
    x = torch.randn(shape, generator=generator) * float(form.input.scale[row]) * 2 ** (form.input.bits - 1)
    result: Tensor = x if form.divisor is None else x * form.divisor.view(-1, *(1,) * (2 if form.is_conv else 0))
    return result

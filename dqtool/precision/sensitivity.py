"""Error of the samples when one operand alone is quantized, for all operands and bit widths at once.

To first order an operand's rounding error `d` changes the output by `J d`. For a random vector `v` of signs, `g = Jᵀ v` is
one backward pass, and `(g · d)²` has the mean `|J d|²` (Hutchinson). A few backward passes of the float network so give
the error of every operand at every width, where one measurement an operand would take hundreds of runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import Checkpoints
from dqtool.core.affine import SYMMETRIC_BITS, fake_quantize, lowest_code, search_weight
from dqtool.core.bits import AttentionBits
from dqtool.core.device import device_of, to_cpu
from dqtool.core.quantization import SOFTMAX_BITS
from dqtool.graph.attention import own_processor
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.quantizers import quantize_operand
from dqtool.nn.steps import StepIndex
from dqtool.nn.surgery import steps_of

__all__ = ["INPUT", "PRODUCTS", "WEIGHT", "Errors", "Tables", "measure_errors"]

WEIGHT, INPUT = "weights", "input"
PRODUCTS = {"q": "q·k", "k": "q·k", "v": "softmax·v", "probs": "softmax·v"}
"""Operands of attention, each with the product that it belongs to."""

GENERATOR = "generator"
"""Name of the random state after a pass, where passes are kept."""

CANDIDATES = 24
"""Ranges that are tried for a weight row here; the real initialisation tries more."""

Errors = dict[tuple[str, str], dict[int, float]]
"""Mean squared error of the samples by layer and operand (`WEIGHT`, `INPUT`, a product), then by bits."""

Tables = Mapping[int, Mapping[str, tuple[Tensor, Tensor]]]
"""Activation tables of `initial_tables` by bits: (scale, zero point) by quantizer."""


@dataclass
class _Pass:
    """Products `g · d` of one backward pass, by layer, operand and bits."""

    products: dict[tuple[str, str, int], float]

    def add(self, layer: str, operand: str, bits: int, value: Tensor) -> None:
        """Add to the product of one operand; several layers that read one quantized input add up."""
        key = (layer, operand, bits)
        self.products[key] = self.products.get(key, 0.0) + float(value)

    def tensors(self, widths: Sequence[int]) -> dict[str, Tensor]:
        """Return the products as tensors `[widths]` by operand and layer; `load` reads them."""
        pairs = dict.fromkeys((layer, operand) for layer, operand, _bits in self.products)
        return {
            f"{operand} of {layer}": torch.tensor(
                [self.products[layer, operand, bits] for bits in widths], dtype=torch.float64
            )
            for layer, operand in pairs
        }

    def load(self, tensors: Mapping[str, Tensor], widths: Sequence[int]) -> None:
        """Take the products from `tensors`."""
        self.products.clear()
        for name, values in tensors.items():
            operand, of, layer = name.partition(" of ")
            if of:
                for bits, value in zip(widths, values.tolist(), strict=True):
                    self.products[layer, operand, bits] = value


class _Tap(torch.autograd.Function):
    """The identity; its backward pass shows value and gradient to `see`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.see = see
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        ctx.see(x, grads[0])
        return grads[0], None


def measure_errors(
    network: nn.Module,
    plans: Sequence[LayerPlan],
    tables: Tables,
    widths: Sequence[int],
    passes: Iterable[tuple[float, Callable[[], Tensor]]],
    kept: Checkpoints | None = None,
    grids: Checkpoints | None = None,
) -> Errors:
    """Return the error of the samples by layer, operand and bits, for each of `widths`.

    `network` is a quantized one of the layers `plans` at integer bits, whose quantizers this function takes out of use: give
    it a network of its own. `passes` yields the weight of a step's error in the sample and what runs the network at that
    step, on one trajectory point. The softmax output has 8 bits at every width. `kept` and `grids` keep the products of
    finished passes and the grids of weights for an interrupted run.
    """
    found, device = _Pass({}), device_of(network)
    tables = {
        bits: {owner: (scale.to(device), zero_point.to(device)) for owner, (scale, zero_point) in of_bits.items()}
        for bits, of_bits in tables.items()
    }
    weights = _tap(network, plans, tables, widths, found)
    rounding = {
        name: _weight_errors(layer, widths, index, grids) for index, (name, layer) in enumerate(weights.items())
    }
    generator = torch.Generator().manual_seed(0)
    squares: dict[tuple[str, str, int], list[float]] = {}
    done = {} if kept is None else kept.found
    for index, (weight, run) in enumerate(passes):
        if index in done:
            generator.set_state(done[index][GENERATOR])
            found.load(done[index], widths)
        else:
            _run(weights, rounding, widths, weight, run, generator, found)
            if kept is not None:
                kept.add(index, found.tensors(widths) | {GENERATOR: generator.get_state()})
        for key, value in found.products.items():
            squares.setdefault(key, []).append(value**2)
    errors: Errors = {}
    for (name, operand, bits), values in sorted(squares.items()):  # in one order, however passes were kept
        errors.setdefault((name, operand), {})[bits] = _careful_mean(values)
    return errors


def _run(
    weights: Mapping[str, FakeQuantLayer],
    rounding: Mapping[str, Sequence[Tensor]],
    widths: Sequence[int],
    weight: float,
    run: Callable[[], Tensor],
    generator: torch.Generator,
    found: _Pass,
) -> None:
    """Fill `found` with the products of one backward pass through what `run` computes, times the step's `weight`."""
    found.products.clear()
    with torch.enable_grad():
        output = run()
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
        (output * signs).sum().mul(weight / output.numel() ** 0.5).backward()
    for name, layer in weights.items():
        if layer.weight.grad is not None:
            for bits, error in zip(widths, rounding[name], strict=True):
                found.add(name, WEIGHT, bits, torch.sum(layer.weight.grad * error, dtype=torch.float64))
            layer.weight.grad = None


def _careful_mean(values: Sequence[float]) -> float:
    """Return the mean and one standard error: of many estimates, those that are too low by chance would be chosen."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    result: float = mean + (variance / len(values)) ** 0.5
    return result


def _tap(
    network: nn.Module, plans: Sequence[LayerPlan], tables: Tables, widths: Sequence[int], found: _Pass
) -> dict[str, FakeQuantLayer]:
    """Let every operand through in float, watched; return the layers whose weights are quantized, by name."""
    steps = steps_of(network)
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    layers: dict[str, FakeQuantLayer] = {}
    for plan in plans:
        module = network.get_submodule(plan.info.name)
        if isinstance(plan.bits, AttentionBits):
            processor = own_processor(module)
            assert isinstance(processor, QuantAttnProcessor)
            see = partial(_see_product, plan.info.name, tables, widths, steps, found)
            processor.quantize = partial(_watch_product, see)  # type: ignore[method-assign]
        elif isinstance(module, FakeQuantLayer):
            owner = plan.info.shares or plan.info.name
            see = partial(_see_input, owner, tables, widths, steps, found)
            module.quantize_input = partial(_watch_input, module, see)  # type: ignore[method-assign]
            module.quantized_weight = partial(getattr, module, "weight")  # type: ignore[method-assign]
            module.weight.requires_grad_(True)
            layers[plan.info.name] = module
    return layers


def _watch(x: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Return `x`, whose gradient `see` will be shown."""
    result: Tensor = _Tap.apply(x if x.requires_grad else x.detach().requires_grad_(), see)  # type: ignore[no-untyped-call]
    return result


def _watch_input(layer: FakeQuantLayer, see: Callable[[Tensor, Tensor], None], x: Tensor) -> Tensor:
    """Return the layer's input as its quantizer reads it, in float; `see` will be shown its gradient."""
    return _watch(layer.transform_input(x), see)


def _watch_product(see: Callable[..., None], _attn: nn.Module, name: str, x: Tensor) -> Tensor:
    return _watch(x, partial(see, name))


def _see_input(
    owner: str, tables: Tables, widths: Sequence[int], steps: StepIndex, found: _Pass, x: Tensor, grad: Tensor
) -> None:
    for bits in widths:
        scale, zero_point = tables[bits][owner]
        error = quantize_operand(x, scale, zero_point, steps.rows, bits).sub_(x)
        found.add(owner, INPUT, bits, torch.vdot(error.flatten(), grad.flatten()))


def _see_product(
    layer: str,
    tables: Tables,
    widths: Sequence[int],
    steps: StepIndex,
    found: _Pass,
    name: str,
    x: Tensor,
    grad: Tensor,
) -> None:
    for bits in widths:
        width = SOFTMAX_BITS if name == "probs" else bits
        scale, zero_point = tables[width][f"{layer}.{name}"]
        low = lowest_code(width, symmetric=name != "probs")
        error = quantize_operand(x, scale, zero_point, steps.rows, width, low).sub_(x)
        found.add(layer, PRODUCTS[name], bits, torch.vdot(error.flatten(), grad.flatten()))


def _weight_errors(layer: FakeQuantLayer, widths: Sequence[int], index: int, grids: Checkpoints | None) -> list[Tensor]:
    """Return the rounding error of a layer's weights at each width, in bfloat16: estimates need no more.

    `grids` holds the layer's grids as those of iteration `index`, or takes them in.
    """
    weight = layer.weight.detach()
    known = None if grids is None else grids.found.get(index)
    if known is None:
        found = {bits: search_weight(weight, bits, bits == SYMMETRIC_BITS, CANDIDATES) for bits in widths}
        known = {f"{bits} {part}": pair[part] for bits, pair in found.items() for part in range(2)}
        if grids is not None:
            grids.add(index, to_cpu(known))
    shape = (-1, *(1,) * (weight.dim() - 1))
    errors = []
    for bits in widths:
        scale, zero_point = (known[f"{bits} {part}"].to(weight.device).view(shape) for part in range(2))
        rounded = fake_quantize(weight, scale, zero_point, bits, lowest_code(bits, bits == SYMMETRIC_BITS))
        errors.append((rounded - weight).bfloat16())
    return errors

"""`openvino`: OpenVINO IR with the step tables inside, which stock OpenVINO runs in int8 without dqtool.

The component's directory holds `openvino_model.xml`, `openvino_model.bin` and the diffusers `config.json`. Inputs are
the network's arguments by name (`added_cond_kwargs.time_ids` for an entry of a dict); `timestep` is float32 `[1]`, or
`[N]` for mixed steps. Batch, height, width and sequence lengths are dynamic where the network allows. Weights of up to 4
bits are u4 constants on disk, others int8; in memory all are int8.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dqtool.artifacts import Artifact
from dqtool.errors import UsageError
from dqtool.formats import Exported, require
from dqtool.formats.tracing import dynamic_axes, quiet_tracing, traced_arguments
from dqtool.models.families import Family, family_of
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.models.networks.packed import packed_network, plans_of
from dqtool.nn.integer import IntegerLayer, Operand
from dqtool.nn.traceable import TraceableNetwork
from dqtool.nn.traceable_codes import ProductForm

if TYPE_CHECKING:
    import openvino

__all__ = [
    "EXTRA",
    "IR",
    "OpenVINOProduct",
    "build_ir",
    "compile_settings",
    "integer_layers",
    "prepare",
    "saturates",
    "save_ir",
    "shrink_weights",
    "to_openvino",
]

EXTRA = "openvino"
IR = "openvino_model.xml"
TIMESTEPS = ["dqtool", "timesteps"]
"""Key in the IR's runtime information under which the timesteps of its tables are stored."""


def prepare(distilled: Artifact) -> Exported:
    """Prepare the network as IR.

    The manifest lists for each layer if its products run in integers (`runs`), as OpenVINO plans it on this machine.

    Raises:
        EnvironmentFault: OpenVINO is not installed.
    """
    require("openvino", EXTRA)
    manifest = distilled.manifest
    family = family_of(manifest.network.class_name, distilled.given)
    config = dict(manifest.network.config)
    network = packed_network(manifest.network.class_name, config, plans_of(manifest), checked_tensors(distilled))
    example = family.example(config)
    # The file must be exact on any CPU, those that saturate included. This slows down layers of 8 bits alone.
    model = build_ir(network, family, example, saturating=True)
    integers = integer_layers(_compile(model, traced_arguments(example, family.timestep)))
    shrink_weights(model)
    layers = [replace(layer, runs="int8" if layer.name in integers else "float") for layer in manifest.layers]

    def write(directory: Path) -> None:
        save_ir(model, directory / IR)

    return Exported(config, layers, write)


class OpenVINOProduct(ProductForm):
    """Products that OpenVINO runs in int8. Group norms become multiply-adds, which fuse with the operations after them.

    `saturating` makes them exact on CPUs whose int8 products sum pairs in 16 bits: a weight whose pairs may overflow is
    split into `2 * half + odd`, two products that fit.
    """

    folds_norms = True

    def __init__(self, saturating: bool = False) -> None:
        self.saturating = saturating

    def fits(self, left: Operand, right: int) -> bool:
        """Return True if sums of pairs fit 16 bits; see `ProductForm.fits`. OpenVINO shifts signed codes by 128."""
        largest = 128 + 2**left.bits - 1 if left.signed else 255
        return not self.saturating or 2 * min(largest, 255) * right <= 32767

    def layer(self, codes: Tensor, weight: Tensor, weight_scale: Tensor, layer: IntegerLayer) -> Tensor:
        """Multiply codes with a weight, in two products if one could overflow; see `ProductForm.layer`."""
        assert layer.input is not None
        values = weight.detach().numpy()
        if self.fits(layer.input, int(np.abs(values.astype(np.int16)).max())):
            return super().layer(codes, weight, weight_scale, layer)
        # Computed by NumPy, so that tracing sees constants.
        half, odd = (torch.from_numpy(part) for part in (values >> 1, values & 1))
        return super().layer(codes, half, weight_scale * 2, layer) + super().layer(codes, odd, weight_scale, layer)


@functools.cache
def saturates() -> bool:
    """Return True if OpenVINO's 8-bit products overflow on this CPU, as they do without VNNI. Determined by a test product."""
    import openvino
    from openvino import opset13

    x = opset13.parameter([1, 64, 8, 8], np.float32)
    bounds = [opset13.constant(np.float32(v)) for v in (0, 255, 0, 255)]
    codes = opset13.fake_quantize(x, *bounds, 256)
    weight = opset13.convert(opset13.constant(np.full((32, 64, 3, 3), 127, np.int8)), "f32")
    scaled = opset13.multiply(weight, opset13.constant(np.ones((32, 1, 1, 1), np.float32)))
    product = opset13.convolution(codes, scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    compiled = openvino.Core().compile_model(openvino.Model([product], [x]), "CPU", compile_settings())
    result = compiled([np.full((1, 64, 8, 8), 255, np.float32)])[0]
    return bool((result != 255.0 * 127 * 64 * 9).any())


def build_ir(packed: nn.Module, family: Family, example: Mapping[str, Any], saturating: bool = False) -> openvino.Model:
    """Convert a packed network, which is changed and must not be used afterwards, to an OpenVINO model.

    `example` are arguments to trace the network with. `saturating` makes the model exact on CPUs without VNNI too, where
    layers of 8 bits then take two products.
    """
    import openvino

    timesteps: Tensor = packed.timesteps  # type: ignore[assignment]
    traceable = TraceableNetwork(
        packed.eval().requires_grad_(False), example, OpenVINOProduct(saturating), family.sample
    )
    tensors = traced_arguments(example, family.timestep)
    with quiet_tracing():
        model = to_openvino(traceable, tuple(tensors.values()))
    shapes = {}
    for port, (name, tensor) in zip(model.inputs, tensors.items(), strict=True):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
        shapes[port] = openvino.PartialShape(
            [-1 if dim in dynamic_axes(tensor, family.traced_size) else size for dim, size in enumerate(tensor.shape)]
        )
    model.outputs[0].get_tensor().set_names({"sample"})
    model.reshape(shapes)
    model.set_rt_info(" ".join(f"{t:.9g}" for t in timesteps.tolist()), TIMESTEPS)
    return model


def to_openvino(network: nn.Module, inputs: tuple[Tensor, ...]) -> openvino.Model:
    """Convert a network to an OpenVINO model by tracing it once with `inputs`.

    PyTorch's check of a trace is switched off: it would trace again and run the network three times, which takes minutes
    for the largest.

    Raises:
        UsageError: OpenVINO has no form of an operation of the network.
    """
    import openvino
    from openvino.frontend import OpConversionFailure
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with torch.no_grad():
        decoder = TorchScriptPythonDecoder(network, example_input=inputs, trace_kwargs={"check_trace": False})
        try:
            return openvino.convert_model(decoder, example_input=inputs)
        except OpConversionFailure as e:
            found = re.search(r"No conversion rule found for operations: (.+)", str(e))
            raise UsageError(
                f"OpenVINO can't convert operations of this network: {found[1] if found else 'it names none'}",
                where="openvino",
                fix="Use the runtime cpu or simulate, or an export of format dq or onnx",
            ) from e


def save_ir(model: openvino.Model, path: Path) -> None:
    """Write `path` (.xml) and the weights next to it (.bin).

    Raises:
        OSError: the files can't be written. OpenVINO raises a RuntimeError, which does not tell a full disk from a bug.
    """
    import openvino

    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as e:
        raise OSError(f"OpenVINO could not write {path.name}: {e}") from e


def shrink_weights(model: openvino.Model) -> None:
    """Store int8 weights whose codes span at most 16 values per out-channel as u4 plus an offset, in place.

    Both are constants, which OpenVINO folds to int8 when it compiles the model.
    """
    from openvino import Type, opset13

    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != Type.i8 or len(node.shape) < 2:
            continue
        codes = node.get_data()
        axes = tuple(range(1, codes.ndim))
        low, high = codes.min(axes, keepdims=True), codes.max(axes, keepdims=True)
        if int((high.astype(np.int16) - low).max()) > 15:
            continue
        readers = list(node.output(0).get_target_inputs())
        offset = opset13.constant(low, dtype=Type.i8, shared_memory=False)
        restored = opset13.add(opset13.convert(_u4_constant((codes - low).astype(np.uint8)), "i8"), offset)
        for reader in readers:
            reader.replace_source_output(restored.output(0))


def integer_layers(compiled: openvino.CompiledModel) -> set[str]:
    """Return the names of layers and attention modules whose products all run on int8 operands in a compiled graph."""
    runs: dict[str, set[bool]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = {key: node.get_rt_info()[key].astype(str) for key in ("layerType", "runtimePrecision")}
        if info["layerType"] not in ("Convolution", "FullyConnected", "MatMul"):
            continue
        names = node.get_rt_info()["originalLayersNames"].astype(str)
        for found in re.finditer(r"__module\.network\.([^/,]+)/aten::(?:_convolution|linear|matmul)/", names):
            runs.setdefault(found[1], set()).add(info["runtimePrecision"] in ("i8", "u8"))
    return {name for name, integers in runs.items() if integers == {True}}


def compile_settings(precision: str = "f32", threads: int | None = None) -> dict[str, Any]:
    """Return the settings for `compile_model`.

    By default OpenVINO computes everything outside of int8 in bf16 on CPUs that have it, which rounds activations before
    they are quantized.
    """
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return settings if threads is None else {**settings, "INFERENCE_NUM_THREADS": threads}


def _compile(model: openvino.Model, tensors: Mapping[str, Tensor]) -> openvino.CompiledModel:
    import openvino

    static = model.clone()
    static.reshape({port: list(tensors[port.any_name].shape) for port in static.inputs})
    return openvino.Core().compile_model(static, "CPU", compile_settings())


def _u4_constant(values: np.ndarray) -> Any:
    import openvino
    from openvino import opset13

    flat = values.reshape(-1)
    flat = np.pad(flat, (0, len(flat) % 2))
    tensor = openvino.Tensor(openvino.Type.u4, list(values.shape))  # owns its memory, unlike one made from an array
    tensor.data.reshape(-1)[:] = flat[::2] | (flat[1::2] << 4)
    return opset13.constant(tensor)

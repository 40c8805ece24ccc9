"""`openvino`: OpenVINO IR with the step tables inside, which stock OpenVINO runs in int8 without dqtool.

The component's directory holds `openvino_model.xml`, `openvino_model.bin` and the diffusers `config.json`. Inputs are
the network's arguments by name (`added_cond_kwargs.time_ids` for an entry of a dict); `timestep` is float32 `[1]`, or
`[N]` for mixed steps. Batch, height, width and sequence lengths are dynamic where the network allows. Weights of up to 4
bits are u4 constants on disk, others int8; in memory all are int8.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dqtool.artifacts import Artifact
from dqtool.formats import Exported, require
from dqtool.formats.tracing import dynamic_axes, quiet_tracing, traced_arguments
from dqtool.models.families import Family, family_of
from dqtool.models.packed import packed_network, plans_of
from dqtool.nn.lowered import LoweredNetwork, Product

if TYPE_CHECKING:
    import openvino

__all__ = ["EXTRA", "IR", "build_ir", "compile_settings", "integer_layers", "prepare", "save_ir", "shrink_weights"]

EXTRA = "openvino"
IR = "openvino_model.xml"
TIMESTEPS = ["dqtool", "timesteps"]
"""Where the IR's runtime information says which timesteps its tables are for."""


def prepare(distilled: Artifact) -> Exported:
    """The network as IR. The manifest says of each layer whether its products run in integers (`runs`), as OpenVINO
    plans it on the exporting machine.

    Raises:
        EnvironmentFault: OpenVINO is not installed.
    """
    require("openvino", EXTRA)
    manifest = distilled.manifest
    family = family_of(manifest.model["class"], distilled.given)
    config = dict(manifest.model["config"])
    network = packed_network(manifest.model["class"], config, plans_of(manifest), distilled.tensors())
    example = family.example(config)
    model = build_ir(network, family, example)
    integers = integer_layers(_compile(model, example))
    shrink_weights(model)
    layers = [{**layer, "runs": "int8" if layer["name"] in integers else "float"} for layer in manifest.layers]

    def write(directory: Path) -> None:
        save_ir(model, directory / IR)

    return Exported(config, layers, write)


class FusingProduct(Product):
    """Group norms as multiply-adds: what follows one then fuses with it, in the layout that convolutions want."""

    folds_norms = True


def build_ir(packed: nn.Module, family: Family, example: Mapping[str, Any]) -> openvino.Model:
    """The OpenVINO model of a packed network, which is used up. `example` are arguments to trace it with."""
    import openvino

    timesteps: Tensor = packed.timesteps  # type: ignore[assignment]
    lowered = LoweredNetwork(packed.eval().requires_grad_(False), example, FusingProduct(), family.sample)
    tensors = traced_arguments(example)
    with torch.no_grad(), quiet_tracing():
        model = openvino.convert_model(lowered, example_input=tuple(tensors.values()))
    shapes = {}
    for port, (name, tensor) in zip(model.inputs, tensors.items(), strict=True):
        port.get_node().set_friendly_name(name)
        port.get_tensor().set_names({name})
        shapes[port] = openvino.PartialShape(
            [-1 if dim in dynamic_axes(tensor) else size for dim, size in enumerate(tensor.shape)]
        )
    model.outputs[0].get_tensor().set_names({"sample"})
    model.reshape(shapes)
    model.set_rt_info(" ".join(f"{t:.9g}" for t in timesteps.tolist()), TIMESTEPS)
    return model


def save_ir(model: openvino.Model, path: Path) -> None:
    """Write `path` (.xml) and the weights beside it (.bin)."""
    import openvino

    openvino.save_model(model, path, compress_to_fp16=False)


def shrink_weights(model: openvino.Model) -> None:
    """Store int8 weights whose codes span at most 16 values per out-channel as u4 and an offset, in place.

    Both are constants, so OpenVINO folds them back to int8 when it compiles the model.
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
    """Names of the layers, and attention modules, all of whose products a compiled graph runs on int8 operands."""
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
    """What `compile_model` must be told. OpenVINO's own choice is bf16 on CPUs that have it, for all that is not int8;
    that rounds activations before they are quantized."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return settings if threads is None else {**settings, "INFERENCE_NUM_THREADS": threads}


def _compile(model: openvino.Model, example: Mapping[str, Any]) -> openvino.CompiledModel:
    import openvino

    static, tensors = model.clone(), traced_arguments(example)
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

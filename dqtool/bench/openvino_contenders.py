"""Contenders in OpenVINO: the float network, and its int8 version by OpenVINO's own post-training method (NNCF)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from dqtool.bench.contender import Loaded
from dqtool.bench.float_contenders import prepare_float
from dqtool.bench.subject import Arguments, Subject
from dqtool.errors import EnvironmentFault

__all__ = ["load_ir", "prepare_ir"]

CALIBRATION_INPUTS = 4
"""Inputs that NNCF calibrates on. Speed does not depend on how good the ranges are."""


def prepare_ir(subject: Subject, quantized: bool) -> None:
    """Write the float network, or its int8 version, as OpenVINO IR.

    Raises:
        EnvironmentFault: OpenVINO or NNCF is missing.
    """
    path = _ir_path(subject, quantized)
    if path.exists():
        return
    openvino = require("openvino", "openvino")
    nncf = require("nncf", "nncf") if quantized else None
    prepare_float(subject)
    if nncf is None:
        openvino.save_model(_convert(subject), path, compress_to_fp16=False)
        return
    dataset = nncf.Dataset(subject.inputs(1)[:CALIBRATION_INPUTS], lambda arguments: _feed(arguments))
    transformer = "Transformer" in subject.class_name
    int8 = nncf.quantize(
        _convert(subject),
        dataset,
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=CALIBRATION_INPUTS,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )
    openvino.save_model(int8, path, compress_to_fp16=False)


def load_ir(subject: Subject, quantized: bool, precision: str | None) -> Loaded:
    """Load the network; it is compiled for each input shape when that is first seen, and the last compilation is kept.

    Static shapes run fastest. `precision` is that of operations outside of int8, "f32" or "bf16"; None leaves the choice
    to OpenVINO.
    """
    import torch

    openvino = require("openvino", "openvino")
    core = openvino.Core()
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": subject.threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise EnvironmentFault(
            "This processor has no bf16 instructions, and OpenVINO would compute in float32 under that name",
            where="--against bf16-openvino",
            fix="Leave it out",
        )
    path = _ir_path(subject, quantized)
    compiled: dict[tuple[Any, ...], Any] = {}

    def request(feed: list[Any]) -> Any:
        shapes = tuple(array.shape for array in feed)
        if shapes not in compiled:
            compiled.clear()
            model = core.read_model(path)
            model.reshape({model.inputs[i]: list(shape) for i, shape in enumerate(shapes)})
            compiled[shapes] = core.compile_model(model, "CPU", settings).create_infer_request()
        return compiled[shapes]

    def run(arguments: Arguments) -> torch.Tensor:
        feed = _feed(arguments)
        result = request(feed).infer(dict(enumerate(feed)), share_inputs=True, share_outputs=True)
        return torch.from_numpy(result[0])

    return Loaded(run)


def require(package: str, extra: str) -> Any:
    """Import a package that `extra` brings.

    Raises:
        EnvironmentFault: it can't be imported.
    """
    try:
        return import_module(package)
    except ImportError as e:
        raise EnvironmentFault(
            f"A contender needs the package {package}, which can't be imported: {e}",
            where="--against",
            fix=f'Run pip install "dqtool[{extra}]", or leave the contender out',
        ) from e


def _convert(subject: Subject) -> Any:
    """Convert the float network to an OpenVINO model whose inputs are the tensors of the arguments, in order."""
    import diffusers
    import torch
    from torch import nn
    from torch.utils._pytree import tree_flatten, tree_unflatten

    from dqtool.formats.openvino import to_openvino
    from dqtool.models.config_extras import apply_config_extras

    network = getattr(diffusers, subject.diffusers_class).from_pretrained(subject.float_directory)
    network = apply_config_extras(network, subject.config).eval()
    example = subject.inputs(2)[0]
    leaves, structure = tree_flatten(example)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *given: torch.Tensor) -> torch.Tensor:
            queue = iter(given)
            filled = [next(queue) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            result: torch.Tensor = self.network(**tree_unflatten(filled, structure), return_dict=False)[0]
            return result

    return to_openvino(Positional(), tuple(tensors))


def _feed(arguments: Arguments) -> list[Any]:
    """Return the tensors of the arguments as arrays, in the order of the model's inputs."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf.numpy() for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]


def _ir_path(subject: Subject, quantized: bool) -> Path:
    return Path(subject.workspace) / ("nncf-int8.xml" if quantized else "openvino-float.xml")

"""Other people's int8 as contenders, each quantized with the settings that its documentation recommends.

Each is written to a file once and loaded from it, in a process of its own. Torch networks are saved whole where that is
possible, because the libraries differ in how they store tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.bench.contender import Loaded
from dqtool.bench.float_contenders import COMPILATIONS, prepare_float
from dqtool.bench.machine import has_int8_dot_products
from dqtool.bench.subject import Arguments, Subject
from dqtool.errors import EnvironmentFault

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "PACKAGES",
    "load_onnxruntime",
    "load_torch",
    "prepare_onnxruntime",
    "prepare_torch",
    "require",
    "saved_file",
]

PACKAGES = {
    "sdnq-int8": ("sdnq", "sdnq"),
    "torchao-int8": ("torchao", "torchao"),
    "quanto-int8": ("optimum.quanto", "optimum-quanto"),
    "onnxruntime-int8": ("onnxruntime", "onnx onnxruntime"),
}
"""Module that a contender imports, and what `pip install` is given, by contender."""

CALIBRATION = 2
"""Inputs that ranges of activations are taken from. Speed does not depend on them."""

LARGE = 1 << 30
"""Parameters in bytes from which an ONNX graph keeps its weights in a file beside it."""


def require(name: str) -> None:
    """Check that the package of a contender is installed.

    Raises:
        EnvironmentFault: it is not; the message has the command that installs it.
    """
    module, packages = PACKAGES[name]
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        raise EnvironmentFault(
            f"The contender {name} needs a package that is not installed",
            where="--against",
            fix=f"pip install {packages}",
        )


def saved_file(subject: Subject, name: str) -> Path:
    """Return the path of what a contender is loaded from."""
    return Path(subject.workspace) / name / ("model.onnx" if name == "onnxruntime-int8" else "model.pt")


def _float_network(subject: Subject) -> nn.Module:
    import diffusers
    import torch

    from dqtool.models.config_extras import apply_config_extras

    prepare_float(subject)
    network = getattr(diffusers, subject.diffusers_class).from_pretrained(
        subject.float_directory, torch_dtype=torch.float32
    )
    return apply_config_extras(network, subject.config).eval().requires_grad_(False)


def _sdnq(network: nn.Module, _inputs: list[Arguments]) -> nn.Module:
    from sdnq import sdnq_post_load_quant
    from sdnq.common import use_torch_compile

    return sdnq_post_load_quant(network, weights_dtype="int8", use_quantized_matmul=bool(use_torch_compile))


def _torchao(network: nn.Module, _inputs: list[Arguments]) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    quantize_(network, Int8DynamicActivationInt8WeightConfig())
    return network


def _quanto(network: nn.Module, inputs: list[Arguments]) -> nn.Module:
    import torch
    from optimum.quanto import Calibration, freeze, qint8, quantize

    quantize(network, weights=qint8, activations=qint8)
    with torch.no_grad(), Calibration(momentum=0.9):
        for arguments in inputs:
            network(**arguments)
    freeze(network)
    return network


QUANTIZERS: dict[str, Callable[[nn.Module, list[Arguments]], nn.Module]] = {
    "sdnq-int8": _sdnq,
    "torchao-int8": _torchao,
    "quanto-int8": _quanto,
}


AS_STATE = ("torchao-int8",)
"""Contenders whose networks can't be saved whole: their tensors are saved."""


def _empty_network(subject: Subject) -> nn.Module:
    """Return the network without storage for its parameters."""
    import torch

    from dqtool.models.families import family_of

    with torch.device("meta"):
        network = family_of(subject.class_name, subject.directory).build(subject.config)
    return network.eval().requires_grad_(False)


def prepare_torch(subject: Subject, name: str) -> None:
    """Quantize the float network with the library of a contender, and save it.

    Raises:
        EnvironmentFault: the library is not installed.
    """
    import torch

    require(name)
    network = QUANTIZERS[name](_float_network(subject), subject.inputs(1)[:CALIBRATION])
    path = saved_file(subject, name)
    path.parent.mkdir(exist_ok=True)
    torch.save(network.state_dict() if name in AS_STATE else network, path)


def load_torch(subject: Subject, name: str, compiled: bool = False) -> Loaded:
    """Load the saved network; `compiled` where the library recommends `torch.compile`."""
    import importlib

    import torch

    require(name)
    importlib.import_module(PACKAGES[name][0])
    # The file was written by `prepare_torch` in a folder of this run.
    network: Any = torch.load(saved_file(subject, name), weights_only=False)
    if name in AS_STATE:
        state, network = network, _empty_network(subject)
        network.load_state_dict(state, assign=True)
    if compiled:
        torch._dynamo.config.recompile_limit = COMPILATIONS
        network = torch.compile(network, dynamic=False)

    def run(arguments: Arguments) -> Tensor:
        with torch.no_grad():
            return network(**arguments, return_dict=False)[0]

    return Loaded(run)


def _flat(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of one forward pass by a name of their own."""
    import torch

    if isinstance(value, torch.Tensor):
        return {prefix: value}
    if isinstance(value, dict):
        return {k: v for key, each in value.items() for k, v in _flat(each, f"{prefix}_{key}".strip("_")).items()}
    return {}


def prepare_onnxruntime(subject: Subject) -> None:
    """Export the float network to ONNX and quantize it statically: per channel, ranges by minimum and maximum.

    Weights have 7 bits on processors whose int8 products saturate, as ONNX Runtime's documentation recommends.

    Raises:
        EnvironmentFault: onnx or onnxruntime is not installed.
    """
    import torch

    require("onnxruntime-int8")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    network = _float_network(subject)
    inputs = subject.inputs(1)[:CALIBRATION]
    names = list(_flat(inputs[0]))
    path = saved_file(subject, "onnxruntime-int8")
    path.parent.mkdir(exist_ok=True)
    given = path.with_name("float.onnx")

    class Flat(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, *tensors: Tensor) -> Tensor:
            return self.network(**dict(zip(names, tensors, strict=True)), return_dict=False)[0]

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rest = [{k: v.numpy() for k, v in _flat(arguments).items()} for arguments in inputs]

        def get_next(self) -> dict[str, Any] | None:
            return self.rest.pop() if self.rest else None

    size = sum(p.numel() * 4 for p in network.parameters())
    batched = {name: {0: "batch"} for name, tensor in _flat(inputs[0]).items() if tensor.dim()}
    with torch.no_grad():
        torch.onnx.export(
            Flat().eval(), tuple(_flat(inputs[0]).values()), str(given), input_names=names, output_names=["result"],
            dynamic_axes={**batched, "result": {0: "batch"}}, opset_version=17, dynamo=False,
        )  # fmt: skip
    quantize_static(
        given, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8, reduce_range=not has_int8_dot_products(), use_external_data_format=size > LARGE,
    )  # fmt: skip
    for left in path.parent.iterdir():
        if not left.name.startswith("model.onnx"):
            left.unlink()


def load_onnxruntime(subject: Subject) -> Loaded:
    """Load the quantized graph into onnxruntime."""
    require("onnxruntime-int8")
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = subject.threads
    path = saved_file(subject, "onnxruntime-int8")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    wanted = {each.name for each in session.get_inputs()}

    def run(arguments: Arguments) -> Tensor:
        given = {name: tensor.numpy() for name, tensor in _flat(arguments).items() if name in wanted}
        return torch.from_numpy(session.run(None, given)[0])

    return Loaded(run)

"""Engines that run an exported network, with one interface.

A runtime is one module (or package) with `available() -> str | None`, the reason why it can't run here, and
`load(artifact) -> nn.Module`, a network with the original's forward signature. An integer one has `integer_report(network)
-> dict[str, str]` as well: "int8" or "float" for each layer and attention. All but `openvino-bf16` compute the same integers;
`simulate` is the reference they are compared with. A new one is one module and one entry in `RUNTIMES`.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import DIRECTORY_MANIFEST, Artifact, open_artifact
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError
from dqtool.runtimes.choice import ORDER, runtime_order
from dqtool.runtimes.names import runtime_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RUNTIMES", "Runtime", "integer_report", "load", "pick", "runtime_name"]


@dataclass(frozen=True)
class Runtime:
    """One engine.

    Attributes:
        name: name on the command line.
        module: its module, imported on use.
        summary: a phrase that describes it.
        weights_in_memory: form of a 4-bit weight in memory while the network runs.
        libraries: packages that it imports when it loads a network.
    """

    name: str
    module: str
    summary: str
    weights_in_memory: str
    libraries: tuple[str, ...] = ()

    def engine(self) -> ModuleType:
        """Import and return the module."""
        return import_module(self.module)


RUNTIMES = {
    runtime.name: runtime
    for runtime in (
        Runtime(
            "cpu",
            "dqtool.runtimes.cpu",
            "int8 in eager PyTorch on x86 CPUs",
            "one byte (16/9 of a byte in 3x3 convolutions that run as Winograd transforms; half a byte in large networks on AVX2)",
        ),
        Runtime("cuda", "dqtool.runtimes.cuda", "int8 on tensor cores of NVIDIA GPUs", "packed bits", ("triton",)),
        Runtime(
            "openvino",
            "dqtool.runtimes.openvino",
            "int8 through OpenVINO, step tables in the graph",
            "one byte",
            ("openvino",),
        ),
        Runtime(
            "openvino-bf16",
            "dqtool.runtimes.openvino_bf16",
            "the same with bf16 around the int8 products: rounds before it quantizes",
            "one byte",
            ("openvino",),
        ),
        Runtime(
            "simulate",
            "dqtool.runtimes.simulate",
            "float fake-quantization, the reference",
            "packed bits, and a float32 copy from the first use on",
        ),
    )
}
"""All runtimes by their name on the command line."""


VARIABLE = "DQTOOL_RUNTIME"
"""Environment variable with the runtime that `auto` stands for."""

READERS = {
    "dense": ("simulate",),
    "openvino": ("openvino", "openvino-bf16"),
    "onnx": (),
    "onnx-qdq": (),
    "compressed-tensors": (),
}
"""Export formats that not every runtime reads, and the runtimes that do."""


def load(directory: str, runtime: str = "auto", batch: int | None = None) -> nn.Module:
    """Load the network of an exported directory, verified against its manifest, ready to run.

    `auto` takes the fastest runtime that this machine and this directory allow, and reports its name. Measurements of
    `dqtool bench` of this network on this machine decide (at the batch nearest to `batch`, if given), else the order
    `choice.ORDER` (`choice.AMX_ORDER` on processors with AMX).

    Raises:
        UsageError: the runtime is unknown.
        ArtifactError: the directory is no intact export, or has a format that the runtime can't read.
        EnvironmentFault: the runtime that was asked for can't run here.
    """
    runtime = os.environ.get(VARIABLE) or runtime if runtime == "auto" else runtime
    runtime = runtime_name(runtime)
    if runtime != "auto" and runtime not in RUNTIMES:
        raise UsageError(
            f"unknown runtime '{runtime}'", where="--runtime", fix=f"Choose from {', '.join(RUNTIMES)} or auto"
        )
    gc.collect()  # networks refer to themselves through their methods: this frees the memory of dropped ones
    artifact = open_artifact(_directory(directory), ["export"])
    _check_format(artifact, runtime)
    if runtime == "auto":
        return _load_fastest(artifact, batch)
    return _load(_ready(RUNTIMES[runtime]), artifact)


def _directory(given: str) -> str:
    """Return the export at `given`, or in it: a pipeline that diffusers saved has the manifest in its network's folder."""
    root = Path(given)
    if (root / DIRECTORY_MANIFEST).exists() or not (root / "model_index.json").is_file():
        return given
    found = sorted(root.glob(f"*/{DIRECTORY_MANIFEST}"))
    return str(found[0].parent) if len(found) == 1 else given


def pick(names: Iterable[str] = ORDER) -> list[tuple[Runtime, str | None]]:
    """Return runtimes in the order in which `auto` tries them, each with the reason why it can't run here, or None."""
    return [(RUNTIMES[name], _unavailable(RUNTIMES[name])) for name in names]


def integer_report(network: nn.Module) -> dict[str, str]:
    """Return "int8" or "float" for each quantized layer and attention of a loaded network: the arithmetic of its products.

    Empty for `simulate`, and for `openvino` until the first step has compiled the graph.
    """
    engine = RUNTIMES[str(network.runtime)].engine()
    return engine.integer_report(network) if hasattr(engine, "integer_report") else {}


def _check_format(artifact: Artifact, runtime: str) -> None:
    exported_as = artifact.manifest.parameters.format or ""
    readers = READERS.get(exported_as)
    if readers is not None and (not readers or runtime not in ("auto", *readers)):
        raise ArtifactError(
            f"This directory was exported with --format {exported_as}, which "
            + (
                f"the {runtime} runtime can't run" if readers else "is for other programs: no runtime of dqtool runs it"
            ),
            where=artifact.given,
            fix=f"Use --runtime {readers[0]}, or export" + " with --format dq"
            if readers
            else "Export with --format dq",
        )


def _ready(runtime: Runtime) -> Runtime:
    reason = _unavailable(runtime)
    if reason is not None:
        raise EnvironmentFault(
            f"The {runtime.name} runtime can't run here: {reason}", where="--runtime", fix="Use --runtime auto"
        )
    return runtime


def _load(runtime: Runtime, artifact: Artifact) -> nn.Module:
    network: nn.Module = runtime.engine().load(artifact)
    network.runtime = runtime.name  # type: ignore[assignment]  # reports name the engine that `auto` took
    if "_dqtool_steps" in network.__dict__:
        from dqtool.models.network_methods import add_methods, origin_of
        from dqtool.nn.packed_form import packed_form

        add_methods(network, origin_of(artifact.manifest, packed_form(network)))
    floats = [name for name, form in integer_report(network).items() if form != "int8"]
    if floats:
        some = ", ".join(floats[:4]) + ", ..." * (len(floats) > 4)
        report.say(f"{runtime.name}: the products of {len(floats)} layers and attentions stay in float: {some}")
    return network


def _load_fastest(artifact: Artifact, batch: int | None) -> nn.Module:
    readers = READERS.get(artifact.manifest.parameters.format or "")
    if readers is not None:
        return _load(_ready(RUNTIMES[readers[0]]), artifact)
    names, why = runtime_order(artifact, batch)
    for runtime, reason in pick(names):
        if reason is not None:
            report.say(f"runtime: not {runtime.name}, {reason}")
            continue
        try:
            network = _load(runtime, artifact)
        except EnvironmentFault as e:
            report.say(f"runtime: not {runtime.name}. {e}")
            continue
        report.say(
            f"runtime: {runtime.name} ({runtime.summary}), {why if runtime.name == names[0] else 'the next best'}"
        )
        return network
    raise AssertionError("simulate runs everywhere")


def _unavailable(runtime: Runtime) -> str | None:
    try:
        result: str | None = runtime.engine().available()
        return result
    except ImportError as e:
        return f"{e.name or e} is not installed"
    except DqtoolError as e:
        return str(e)

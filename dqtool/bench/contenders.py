"""Contenders of a benchmark: dqtool's runtimes and their alternatives, one entry each.

Every contender is loaded from files as its user would load it, by the same function in the process that times all of them
and in the fresh process that measures its load time and memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from dqtool.bench.contender import Contender, Loaded
from dqtool.bench.float_contenders import load_float, prepare_float
from dqtool.bench.openvino_contenders import load_ir, prepare_ir
from dqtool.bench.peer_contenders import (
    PACKAGES,
    load_onnxruntime,
    load_torch,
    prepare_onnxruntime,
    prepare_torch,
    require,
    saved_file,
)
from dqtool.bench.sdcpp_contender import NAME as SDCPP
from dqtool.bench.sdcpp_contender import find_command, measure_sdcpp, prepare_sdcpp
from dqtool.bench.subject import Arguments, Subject
from dqtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BASELINES", "CONTENDERS", "contender_names", "contender_of"]


def load_runtime(subject: Subject, runtime: str) -> Loaded:
    """Load the exported network in one of dqtool's runtimes."""
    import torch

    from dqtool.runtimes import load

    network = load(subject.directory, runtime)

    def run(arguments: Arguments) -> Tensor:
        with torch.no_grad():
            result: Tensor = network(**arguments, return_dict=False)[0]
            return result

    taken = getattr(network, "runtime", None)
    return Loaded(run, note=f"took {taken}" if runtime == "auto" and isinstance(taken, str) else "")


def _float(name: str, **options: Any) -> Contender:
    return Contender(
        name,
        partial(load_float, **options),
        prepare_float,
        probed=not options.get("channels_last"),
        file=lambda subject: subject.float_directory,
    )


def _ir(name: str, **options: Any) -> Contender:
    return Contender(
        name,
        partial(load_ir, **options),
        partial(prepare_ir, quantized=options["quantized"]),
        libraries=("torch", "openvino"),
    )


def _peer(name: str, **options: Any) -> Contender:
    onnx = name == "onnxruntime-int8"
    return Contender(
        name,
        load_onnxruntime if onnx else partial(load_torch, name=name, **options),
        prepare_onnxruntime if onnx else partial(prepare_torch, name=name),
        libraries=("torch", PACKAGES[name][0]) if onnx else ("torch", "diffusers", PACKAGES[name][0]),
        probed=False,
        alone=True,
        file=partial(saved_file, name=name),
        require=partial(require, name),
    )


def _not_loaded(_subject: Subject) -> Loaded:
    raise AssertionError("this contender is a program of its own")


CONTENDERS = {
    contender.name: contender
    for contender in (
        _float("fp32", dtype="float32"),
        _float("fp32-channels-last", dtype="float32", channels_last=True),
        _float("fp32-compile", dtype="float32", compiled=True),
        _float("bf16", dtype="bfloat16"),
        _float("bf16-channels-last", dtype="bfloat16", channels_last=True),
        _float("bf16-compile", dtype="bfloat16", compiled=True),
        _ir("fp32-openvino", quantized=False, precision="f32"),
        _ir("bf16-openvino", quantized=False, precision="bf16"),
        _ir("nncf-int8", quantized=True, precision=None),
        _peer("sdnq-int8"),
        _peer("torchao-int8", compiled=True),  # its documentation always compiles
        _peer("quanto-int8"),
        _peer("onnxruntime-int8"),
        Contender(
            SDCPP, _not_loaded, prepare_sdcpp, probed=False, alone=True, measure=measure_sdcpp, require=find_command
        ),
    )
}
"""Alternatives that the network is measured against, by name. None has the name of a runtime."""

GROUPS = {"fp32": ("fp32", "fp32-channels-last"), "bf16": ("bf16", "bf16-channels-last")}
"""Names of `--against` that stand for several contenders, one for each memory format. The faster one counts."""

BASELINES = GROUPS["fp32"]
"""Contenders that ratios refer to: the faster of those that are measured."""


def contender_names(names: Iterable[str]) -> list[str]:
    """Return the names of the contenders that a user asked for. `fp32` and `bf16` stand for both memory formats, `none` for
    no contender.

    Raises:
        UsageError: there is no such contender.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "none":
            continue
        if name not in CONTENDERS:
            raise UsageError(
                f"unknown contender '{name}'", where="--against", fix=f"Choose from {', '.join(CONTENDERS)}"
            )
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return list(found)


def contender_of(name: str) -> Contender:
    """Return the contender or the runtime of this name."""
    if name in CONTENDERS:
        return CONTENDERS[name]
    from dqtool.runtimes import RUNTIMES, pick

    taken = [RUNTIMES[name]] if name != "auto" else [runtime for runtime, reason in pick() if reason is None]
    libraries = ("torch", "diffusers", *(name for runtime in taken for name in (*runtime.libraries, runtime.module)))
    return Contender(name, partial(load_runtime, runtime=name), libraries=libraries)

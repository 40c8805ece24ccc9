"""Who is measured: dqtool's runtimes, and what one would use instead. One entry per contender.

Every contender is loaded from files as its user would load it, by the same function in the process that times all of them
and in the fresh process that measures its load time and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dqtool.bench.subject import Arguments, Subject
from dqtool.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BASELINES", "CONTENDERS", "Contender", "Loaded", "contender_of", "expand"]


COMPILATIONS = 256
"""Of one network that `torch.compile` may make: one a batch and a contender."""


@dataclass(frozen=True)
class Loaded:
    """A network ready to run: `adapt` converts arguments beforehand (dtype, layout: not timed), `run` is one step.

    `note` says what the table should add to the name.
    """

    run: Callable[[Arguments], Tensor]
    adapt: Callable[[Arguments], Arguments] = lambda arguments: arguments
    note: str = ""


@dataclass(frozen=True)
class Contender:
    """A way to run the network. `prepare` writes the files that `load` reads; `libraries` are imported before memory counts.

    `probed`: whether load time and memory are worth measuring (a memory format changes neither).
    """

    name: str
    load: Callable[[Subject], Loaded]
    prepare: Callable[[Subject], object] | None = None
    libraries: tuple[str, ...] = ("torch", "diffusers")
    probed: bool = True


def load_float(subject: Subject, dtype: str, channels_last: bool = False, compiled: bool = False) -> Loaded:
    """The float network in PyTorch, from its diffusers directory."""
    import diffusers
    import torch

    from dqtool.models.amendments import amend

    kind = getattr(torch, dtype)
    network = getattr(diffusers, subject.class_name).from_pretrained(subject.float_directory, torch_dtype=kind)
    network = amend(network, subject.config).eval().requires_grad_(False)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        # Past a number of compilations of the same code, those of all contenders and batches, it would quietly run eager.
        torch._dynamo.config.recompile_limit = COMPILATIONS
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Static shapes and frozen weights: the strongest form of it.
        network = torch.compile(network, dynamic=False, options={"freezing": True})

    def run(arguments: Arguments) -> Tensor:
        with torch.no_grad():
            return network(**arguments, return_dict=False)[0]

    return Loaded(run, lambda arguments: Subject.cast(arguments, kind, channels_last))


def prepare_float(subject: Subject) -> None:
    """Write the float directory, as `save_pretrained` does (which refuses networks that share modules)."""
    from dqtool.artifacts.tensorfile import save_tensors
    from dqtool.bench.reference import float_network
    from dqtool.models.export_layout import WEIGHTS
    from dqtool.models.families import family_of
    from dqtool.models.repeats import restore_repeats

    if subject.float_directory.exists():
        return
    network = float_network(subject)
    pairs = family_of(subject.class_name, subject.directory).repeats(subject.config)
    subject.float_directory.mkdir()
    network.save_config(subject.float_directory)  # type: ignore[operator]
    save_tensors(subject.float_directory / WEIGHTS, restore_repeats(network.state_dict(), pairs))


def load_runtime(subject: Subject, runtime: str) -> Loaded:
    """The exported network in one of dqtool's runtimes."""
    import torch

    from dqtool.runtimes import load

    network = load(subject.directory, runtime)

    def run(arguments: Arguments) -> Tensor:
        with torch.no_grad():
            return network(**arguments, return_dict=False)[0]

    taken = getattr(network, "runtime", None)
    return Loaded(run, note=f"took {taken}" if runtime == "auto" and isinstance(taken, str) else "")


def _openvino(function: str) -> Callable[..., Any]:
    """A function of the OpenVINO contenders, whose module is imported on use."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        from dqtool.bench import openvino_contenders

        return getattr(openvino_contenders, function)(*arguments, **keywords)

    return call


def _float(name: str, **options: Any) -> Contender:
    return Contender(name, partial(load_float, **options), prepare_float, probed=not options.get("channels_last"))


def _ir(name: str, **options: Any) -> Contender:
    return Contender(
        name,
        partial(_openvino("load_ir"), **options),
        partial(_openvino("prepare_ir"), quantized=options["quantized"]),
        libraries=("torch", "openvino"),
    )


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
    )
}
"""What the network is measured against, by name. None is the name of a runtime."""

GROUPS = {"fp32": ("fp32", "fp32-channels-last"), "bf16": ("bf16", "bf16-channels-last")}
"""Names that stand for the same thing in more than one memory format: the faster one counts."""

BASELINES = GROUPS["fp32"]
"""Ratios are to the faster of these, where they are measured."""


def expand(names: Iterable[str]) -> list[str]:
    """Contenders by the names a user gave, eager ones in both memory formats.

    Raises:
        UsageError: a name that isn't known.
    """
    found: dict[str, None] = {}
    for name in names:
        if name not in CONTENDERS:
            raise UsageError(
                f"unknown contender '{name}'", where="--against", fix=f"Choose from {', '.join(CONTENDERS)}"
            )
        found.update(dict.fromkeys(GROUPS.get(name, (name,))))
    return list(found)


def contender_of(name: str) -> Contender:
    """One of `CONTENDERS`, or the runtime of that name."""
    if name in CONTENDERS:
        return CONTENDERS[name]
    from dqtool.runtimes import RUNTIMES, pick

    taken = [RUNTIMES[name]] if name != "auto" else [runtime for runtime, reason in pick() if reason is None]
    libraries = ("torch", "diffusers", *(name for runtime in taken for name in (*runtime.libraries, runtime.module)))
    return Contender(name, partial(load_runtime, runtime=name), libraries=libraries)

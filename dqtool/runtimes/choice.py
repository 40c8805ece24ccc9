"""Choice of the runtime for `auto`: the fastest one measured here for this network, else by the processor's instructions.

`dqtool bench` times every runtime at several batches, and keeps the times in `$DQTOOL_CACHE` (default `~/.cache/dqtool`),
per network, machine, number of threads and versions. Nothing is timed while a network loads.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from dqtool.artifacts import Artifact, cache_directory, dqtool_version, keep_in_cache
from dqtool.artifacts.manifest import package_version
from dqtool.artifacts.reading import load_json
from dqtool.core.device import chosen_device, gpu_wanted
from dqtool.errors import DqtoolError, EnvironmentFault
from dqtool.runtimes.names import runtime_name

__all__ = ["AMX_ORDER", "ORDER", "preferred", "recalled_timings", "remember_timings", "runtime_order"]

ORDER = ("cpu", "openvino", "simulate")
"""Order without a measurement. With AVX512-VNNI and with AVX2 alone, `cpu` was the fastest at every batch from 1 to 16
(`dqtool bench --arch ddpm-cifar10 --runtime all`)."""

AMX_ORDER = ("openvino", "cpu", "simulate")
"""Order on processors with AMX. There `openvino` was the fastest at every batch from 1 to 16 (the same command), when `cpu`
left AMX to PyTorch's operations. The AMX kernels of `cpu` have not been timed; `dqtool bench` measures the order."""

GPU = "cuda"
"""Runtime that comes first where there is a CUDA device."""

GENERATION = 2
"""Version of the remembered times. A change of the runtimes' speed raises it, and earlier times no longer count."""

CPUINFO = Path("/proc/cpuinfo")


def runtime_order(artifact: Artifact, batch: int | None = None) -> tuple[list[str], str]:
    """Return the runtimes in the order to try them, and the reason for the first one. `batch` is the number of samples of a
    step."""
    found = recalled_timings(artifact)
    if not found:
        return list(_default_order()), "by default"
    near = min(found, key=lambda b: abs(b - batch)) if batch is not None else min(found)
    # Only measured runtimes change places: their times say nothing about the others.
    measured = sorted((name for name in found[near] if name in _default_order()), key=lambda name: found[near][name])
    fastest = iter(measured)
    names = [next(fastest) if name in measured else name for name in _default_order()]
    if names[0] not in measured:
        return names, "by default"
    return names, f"the fastest that `dqtool bench` measured here at batch {near}"


def preferred(artifact: Artifact) -> tuple[str, str]:
    """Return the faster one of `cpu` and `simulate`, which diffusers can load, and a phrase that gives the reason.

    `cpu` comes first where nothing was measured. The phrase names `openvino` where that was the fastest of all.
    """
    if not recalled_timings(artifact):
        return "cpu", ""
    names, why = runtime_order(artifact)
    name = min(("cpu", "simulate"), key=names.index)
    if names[0] == name:
        return name, f", {why}"
    return name, f"; {names[0]} is faster, {why}: dqtool.load({artifact.given!r}, runtime='{names[0]}')"


def _default_order() -> tuple[str, ...]:
    chosen = chosen_device().type
    if chosen != "cpu":  # a command computes where `--device` says
        return (GPU, "simulate") if chosen == GPU else ("simulate",)
    order = AMX_ORDER if "amx_int8" in _processor().split() else ORDER
    return (GPU, *order) if gpu_wanted() else order


def recalled_timings(artifact: Artifact) -> dict[int, dict[str, float]]:
    """Return the measured seconds of a step by batch and runtime; empty without a measurement on this machine."""
    try:
        kept = load_json(_file(artifact))
        return {
            int(batch): {runtime_name(n): float(s) for n, s in times.items()}
            for batch, times in kept["seconds"].items()
        }
    except (DqtoolError, OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def remember_timings(artifact: Artifact, seconds: Mapping[int, Mapping[str, float]]) -> bool:
    """Keep measured seconds of a step that compare at least two runtimes. Return whether they were kept: a cache that can't
    be written is no error."""
    useful = {batch: {n: s for n, s in times.items() if n in (GPU, *ORDER)} for batch, times in seconds.items()}
    useful = {batch: times for batch, times in useful.items() if len(times) > 1}
    if not useful:
        return False
    kept = recalled_timings(artifact)
    merged = {str(b): kept.get(b, {}) | useful.get(b, {}) for b in kept | useful}
    text = json.dumps({"network": artifact.given, "seconds": merged}, indent=2)
    try:
        path = _file(artifact)
    except EnvironmentFault:
        return False
    return keep_in_cache(path, lambda new: new.write_text(text, encoding="utf-8")) is None


def _file(artifact: Artifact) -> Path:
    import torch

    identity = (
        GENERATION,
        artifact.sha256,
        _processor(),
        torch.get_num_threads(),
        dqtool_version(),
        *map(package_version, ("torch", "openvino")),
    )
    return cache_directory("auto") / f"{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.json"


def _processor() -> str:
    try:
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted(line for line in lines if line.startswith(("model name", "flags", "Features", "cpu family")))
    )

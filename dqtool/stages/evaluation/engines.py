"""Engine that runs an exported directory for `dqtool sample` and `dqtool eval`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.artifacts import Artifact
from dqtool.errors import UsageError
from dqtool.runtimes.names import runtime_name

if TYPE_CHECKING:
    from torch import nn

__all__ = ["requested_runtime", "run_exported"]


def requested_runtime(artifact: Artifact, runtime: str) -> str:
    """Return the present name of the runtime that `--runtime` asks for. Artifacts before the export run in `simulate`.

    Raises:
        UsageError: an artifact before the export is given with another runtime.
    """
    runtime = runtime_name(runtime)
    if artifact.stage == "export":
        return runtime
    if runtime not in ("auto", "simulate"):
        raise UsageError(
            f"The runtime '{runtime}' can't run what `dqtool {artifact.stage}` wrote: runtimes are for exported directories",
            where="--runtime",
            fix="Run `dqtool export` first, or leave --runtime out",
        )
    return "simulate"


def run_exported(directory: str, runtime: str, batch: int | None = None) -> nn.Module:
    """Load an exported directory to run `batch` samples at a time; its attribute `runtime` names the engine.

    `auto` is the fastest engine of the chosen device.

    Raises:
        UsageError: an unknown runtime.
        ArtifactError: the directory is no intact export, or of a format that the runtime can't read.
        EnvironmentFault: the runtime that was asked for can't run here.
    """
    from dqtool.core.device import place
    from dqtool.runtimes import load

    network = load(directory, runtime, batch)
    return place(network) if network.runtime in ("simulate", "cuda") else network

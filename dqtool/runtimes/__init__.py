"""Engines that run an exported network. One file each, one interface: `load(artifact) -> nn.Module`.

The module has the original network's forward signature. All engines compute the same integers; `simulate` is the
reference they are compared with.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dqtool.artifacts import open_artifact
from dqtool.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["RUNTIMES", "load"]

RUNTIMES = {"simulate": "dqtool.runtimes.simulate"}
"""Name on the command line, and the module that implements it (imported on use)."""

PREFERENCE = ("simulate",)
"""What `auto` tries, fastest first."""


def load(directory: str, runtime: str = "auto") -> nn.Module:
    """The network of an exported directory, verified against its manifest, ready to run.

    Raises:
        UsageError: an unknown runtime.
        ArtifactError: the directory is no intact export.
    """
    if runtime == "auto":
        runtime = PREFERENCE[0]
    if runtime not in RUNTIMES:
        raise UsageError(
            f"unknown runtime '{runtime}'", where="--runtime", fix=f"Choose from {', '.join(RUNTIMES)} or auto"
        )
    artifact = open_artifact(directory, ["export"])
    return import_module(RUNTIMES[runtime]).load(artifact)

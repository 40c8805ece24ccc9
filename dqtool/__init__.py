"""dqtool turns a full-precision diffusion model into one that runs at 4-8 bits.

Importing this package is light (no torch, no diffusers) and makes `DiffusionPipeline.from_pretrained` understand the
directories that `dqtool export` writes: the registration waits until diffusers is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dqtool._hook import install

if TYPE_CHECKING:
    from torch import nn

    from dqtool.runtimes.quantizer import DqtoolConfig

__all__ = ["DqtoolConfig", "__version__", "load"]
__version__ = "0.2.0"

install()


def __getattr__(name: str) -> Any:
    """Import `DqtoolConfig`, and with it torch and diffusers, when it is asked for."""
    if name == "DqtoolConfig":
        from dqtool.runtimes.quantizer import DqtoolConfig

        return DqtoolConfig
    raise AttributeError(f"module 'dqtool' has no attribute {name!r}")


def load(directory: str, runtime: str = "auto", batch: int | None = None) -> nn.Module:
    """Return the quantized network of an exported directory, with the original's forward signature, in eval mode.

    `runtime` is one of `dqtool.runtimes.RUNTIMES`, or `auto`: the fastest that this machine allows, as far as
    `dqtool bench` measured it; `batch` says how many samples a step will have, where that decides. Raises
    `dqtool.errors.ArtifactError` when the directory is no intact export, `UsageError` for an unknown runtime,
    `EnvironmentFault` when the one asked for can't run here.
    """
    from dqtool.runtimes import load as load_runtime

    return load_runtime(directory, runtime, batch)

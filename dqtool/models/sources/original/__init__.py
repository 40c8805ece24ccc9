"""Original checkpoints: files as the models' authors published them, read as diffusers networks.

`recognise` finds the layout by the names of a file's tensors; `convert` renames and reshapes them. Each module of this package
that registers a `Layout` adds one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dqtool.artifacts.header import TensorEntry
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original import (
    ddim_cifar10,
    dit,
    guided_diffusion,
    latent_diffusion,
    stable_diffusion,
    transformers,
)
from dqtool.models.sources.original.checkpoint import is_pickle, read_checkpoint, read_entries
from dqtool.models.sources.original.layout import LAYOUTS, Description, Known, Layout

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LAYOUTS", "Description", "Known", "Layout", "convert", "is_pickle", "recognise"]

_MODULES = (
    ddim_cifar10,
    dit,
    guided_diffusion,
    latent_diffusion,
    stable_diffusion,
    transformers,
)  # importing these modules fills LAYOUTS


def recognise(path: Path) -> tuple[Layout, dict[str, TensorEntry]] | None:
    """Return the layout of a checkpoint and {dtype, shape} of its tensors; None where no layout matches.

    Raises:
        ArtifactError: the file is damaged, or a pickle that would run code.
    """
    entries = read_entries(path)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    for layout in LAYOUTS.values():
        if layout.matches(shapes):
            return layout, entries
    return None


def convert(path: Path, layout: str, config: ForeignConfig) -> dict[str, Tensor]:
    """Return the network's tensors under diffusers' names, in the file's own precision.

    Raises:
        ArtifactError: tensors are missing or have other shapes than the layout requires.
    """
    try:
        return LAYOUTS[layout].convert(read_checkpoint(path), config, str(path))
    except (KeyError, IndexError) as error:
        raise ArtifactError(
            f"The checkpoint lacks the tensor {error}, which the layout '{LAYOUTS[layout].title}' has",
            where=str(path),
            fix="Make or download it again, or name the right config with --config",
        ) from error

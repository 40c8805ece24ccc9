"""Original checkpoints: files as the models' authors published them, read as diffusers networks.

`recognise` finds the layout by the names of a file's tensors; `convert` renames and reshapes them. Each module of this package
that registers a `Layout` adds one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool.artifacts.header import TensorEntry
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError, UsageError
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

__all__ = ["LAYOUTS", "Description", "Known", "Layout", "check_variant", "convert", "is_pickle", "recognise"]

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


AVERAGED = "model_ema."
"""Prefix of averaged weights beside the trained ones."""
EMA, NON_EMA = "ema", "non_ema"
"""Variants of a file that holds both."""


def check_variant(variant: str | None, names: Iterable[str], path: str) -> None:
    """Raise `UsageError` for a variant that a single file does not hold."""
    if variant is None or (variant in (EMA, NON_EMA) and any(name.startswith(AVERAGED) for name in names)):
        return
    raise UsageError(
        f"This file has no variant '{variant}': variants of a single file are {EMA} and {NON_EMA}, where it holds averaged "
        f"weights under '{AVERAGED}' beside the trained ones",
        where=f"--variant, {path}",
        fix="Leave it out, or save the weights you want as a file of their own",
    )


def convert(path: Path, layout: str, config: ForeignConfig, variant: str | None = None) -> dict[str, Tensor]:
    """Return the network's tensors under diffusers' names, in the file's own precision.

    Averaged weights are taken where the file has them, unless `variant` is `non_ema`.

    Raises:
        ArtifactError: tensors are missing or have other shapes than the layout requires.
    """
    try:
        state = read_checkpoint(path)
        if variant == NON_EMA:
            state = {name: tensor for name, tensor in state.items() if not name.startswith(AVERAGED)}
        return LAYOUTS[layout].convert(state, config, str(path))
    except (KeyError, IndexError) as error:
        raise ArtifactError(
            f"The checkpoint lacks the tensor {error}, which the layout '{LAYOUTS[layout].title}' has",
            where=str(path),
            fix="Make or download it again, or name the right config with --config",
        ) from error

"""Quantizer settings by name (App. E of arXiv 2409.14307): what all layers get, and what rivals leave out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from dqtool.core.bits import FLOAT_BITS
from dqtool.errors import UsageError

if TYPE_CHECKING:
    from dqtool.artifacts import Manifest
    from dqtool.graph.roles import Roles
    from dqtool.graph.trace import LayerInfo

__all__ = ["PRESETS", "check_preset", "kept_layers", "preset_keep"]

PRESETS = ("standard", "nonstandard")
"""`standard`: every layer and both attention products, one activation scale a layer (and step). `nonstandard`, as EfficientDM
does: convolutions after an upsampling, skip connections and the attention products stay float. QuEST's way at 4 bits, a
scale for each in-channel of the activations, is not offered: no integer product can take such scales out of its sum
(App. I)."""


def check_preset(name: str) -> None:
    """Raise `UsageError` for a preset that does not exist."""
    if name not in PRESETS:
        raise UsageError(f"unknown preset '{name}'", where="--preset", fix=f"Choose from {', '.join(PRESETS)}")


def preset_keep(name: str, manifest: Manifest) -> tuple[str, ...]:
    """The preset as `--keep` patterns for the network of a dilated or calibrated artifact."""
    if name == "standard":
        return ()
    from dqtool.models.packed import layer_infos
    from dqtool.models.structure import graph_of

    return kept_layers(layer_infos(manifest.layers), graph_of(manifest).roles)


def kept_layers(layers: list[LayerInfo], roles: Roles) -> tuple[str, ...]:
    """One pattern for each layer that `nonstandard` leaves float."""
    chosen = {*roles.resized, *roles.shortcuts, *(info.name for info in layers if info.kind == "attention")}
    return tuple(
        f"{re.escape(info.name)}={FLOAT_BITS}/{FLOAT_BITS}"
        for info in layers
        if info.name in chosen and info.role is None
    )

"""Families of diffusion networks: one adapter a file. The rest of dqtool knows no family.

An adapter says which class it serves, which of its modules are trained as one block, what a minimal input looks like,
what the network is conditioned on and how it is called. `register` adds one; `family_of` finds it by the class name
that an artifact records: that of the diffusers class, or `generic:` and that name for a network without an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqtool.errors import ArtifactError
from dqtool.models.families import dit, flux, pixart, sd3, unet2d, unet2d_condition  # noqa: F401
from dqtool.models.families.base import FAMILIES, Family, register
from dqtool.models.families.generic import PREFIX, Generic

__all__ = ["FAMILIES", "Family", "family_of", "register"]


def family_of(class_name: str, where: str, config: Mapping[str, Any] | None = None) -> Family:
    """Return the adapter for a diffusers class, as an artifact names it; a `config` is checked before it is used.

    Raises:
        ArtifactError: no adapter serves the class, or the config is not one of it.
    """
    family = _family(class_name, where)
    if config is not None:
        family.check(config)
    return family


def _family(class_name: str, where: str) -> Family:
    if class_name.startswith(PREFIX):
        return Generic(class_name.removeprefix(PREFIX))
    if class_name not in FAMILIES:
        raise ArtifactError(
            f"dqtool has no adapter for networks of class '{class_name}'",
            where=where,
            fix=f"Supported classes: {', '.join(sorted(FAMILIES))}. `dqtool dilate --family generic` tries any other one",
        )
    return FAMILIES[class_name]

"""Families of diffusion networks, one adapter per file; no other code depends on a network's class.

An adapter names the class it serves and the modules that are trained as one block. It defines a minimal input, the
conditions, and the arguments of the forward. `register` adds an adapter; `family_of` finds it by the class name in an
artifact: the diffusers class, or `generic:` and the class for a network without an adapter.
"""

from __future__ import annotations

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.families import dit, flux, pixart, sd3, unet2d, unet2d_condition  # noqa: F401
from dqtool.models.families.base import FAMILIES, Family, register
from dqtool.models.families.generic import PREFIX, Generic

__all__ = ["FAMILIES", "Family", "family_of", "register"]

HELPERS = ("ControlNet", "T2IAdapter", "Autoencoder", "VQModel")
"""Parts of the class names of diffusers' networks that work beside a denoiser."""


def family_of(class_name: str, where: str, config: ForeignConfig | None = None) -> Family:
    """Return the adapter for the class name in an artifact, and check `config` against it where one is given.

    Raises:
        ArtifactError: the class has no adapter, or the config is invalid for it.
    """
    family = _family(class_name, where, config)
    if config is not None:
        family.check(config)
    return family


def _family(class_name: str, where: str, config: ForeignConfig | None) -> Family:
    helper = next((kind for kind in HELPERS if kind in class_name), None)
    if helper is not None:
        raise ArtifactError(
            f"{class_name} is no denoiser: it makes inputs of one",
            where=where,
            fix="Quantize the denoiser, and give this network to the pipeline as it is: it works beside a quantized one",
        )
    if class_name.startswith(PREFIX):
        return Generic(class_name.removeprefix(PREFIX), config)
    if class_name not in FAMILIES:
        raise ArtifactError(
            f"dqtool has no adapter for networks of class '{class_name}'",
            where=where,
            fix=f"Supported classes: {', '.join(sorted(FAMILIES))}. `dqtool dilate --family generic` tries any other one",
        )
    return FAMILIES[class_name]

"""Tiny networks of diffusers' denoiser classes: config, arguments, and how their pipelines call them."""

from __future__ import annotations

from typing import Any

import torch
from denoiser_parts import Denoiser
from denoisers_joint import JOINT
from denoisers_others import OTHERS
from denoisers_unets import UNETS
from denoisers_videos import VIDEOS
from torch import Tensor

__all__ = ["DENOISERS", "Denoiser", "build_denoiser", "example_tensors"]

DENOISERS: dict[str, Denoiser] = {**UNETS, **OTHERS, **JOINT, **VIDEOS}
"""Networks by the diffusers class, in the table's order."""


def build_denoiser(name: str, seed: int = 0) -> Any:
    """Return the network of class `name` with random weights; parameters that start at zero are drawn too."""
    import diffusers

    torch.manual_seed(seed)
    network = getattr(diffusers, name)(**DENOISERS[name].config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if not bool(parameter.any()) or not bool(parameter.isfinite().all()):
                parameter.normal_(std=0.1)
    return network


def example_tensors(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Return the tensors of the example file, `[1, ...]` each."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value if isinstance(value, Tensor) else torch.randn(value, generator=generator)
        for key, value in DENOISERS[name].inputs.items()
    }

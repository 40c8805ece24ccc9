"""How far images are from their references, image by image."""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.errors import UsageError

__all__ = ["PSNR_CAP", "mse", "psnr"]

PSNR_CAP = 100.0
"""dB reported for images that are identical, or so close that float32 noise is all there is: keeps means finite."""


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference per image, `[N]` float64, of `a`, `b [N, ...]`. Raises `UsageError` if shapes differ."""
    if a.shape != b.shape or a.ndim < 2:
        raise UsageError(
            f"Images can only be compared with as many references of the same size, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}.",
            fix="Compare with samples of the same count, from a model of the same resolution.",
        )
    return (a.detach().double() - b.detach().double()).square().flatten(1).mean(dim=1)


def psnr(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio per image in dB, `[N]` float64, at most `PSNR_CAP`.

    `data_range` is the distance between black and white: 2 for images in [-1, 1], 1 for [0, 1], 255 for bytes.
    """
    return (10 * torch.log10(data_range**2 / mse(a, b))).clamp(max=PSNR_CAP)

"""Fine detail of images and latents: the part that a small blur removes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["detail"]


def detail(x: Tensor) -> Tensor:
    """Return `x` `[N, C, H, W]` minus its blurred copy. The blur kernel is 1 2 1 in both directions; borders are
    repeated."""
    padded = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    padded = torch.cat([padded[..., :1], padded, padded[..., -1:]], 3)
    return x - F.avg_pool2d(F.avg_pool2d(padded, 2, 1), 2, 1)  # two 2 x 2 averages make that blur

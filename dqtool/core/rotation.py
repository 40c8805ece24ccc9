"""Grouped Hadamard rotation of channels (QuaRot, arXiv 2404.00456), which spreads the outliers of a channel over its group.

The rotation of a group of `n` channels is the Sylvester matrix `H / sqrt(n)`, symmetric and its own inverse, so a layer with
the rotated weight `W H` on the rotated input `H x` computes `W x`. It is computed by `log2 n` additions for each channel, in one
fixed order and then one multiplication: all engines get the same floats, bit for bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["SIZES", "factor", "fitting_sizes", "rotate", "rotate_weight"]

SIZES = (64, 32, 16)
"""Group sizes that are offered."""


def fitting_sizes(channels: int, groups: int = 1) -> Iterator[int]:
    """Yield the group sizes that divide a layer's in-channels, the largest first; none for a grouped convolution."""
    yield from (size for size in SIZES if groups == 1 and channels % size == 0)


def factor(size: int) -> float:
    """Return `1 / sqrt(size)` as float32 has it."""
    return float(struct.unpack("f", struct.pack("f", size**-0.5))[0])


def rotate(x: Tensor, size: int, dim: int = -1) -> Tensor:
    """Return `x` with the channels of dimension `dim` rotated in groups of `size`; 0 rotates nothing. Differentiable."""
    return _turned(x, size, dim % x.dim()) * factor(size) if size else x


def rotate_weight(weight: Tensor, size: int) -> Tensor:
    """Return a weight `[C_out, C_in, ...]` for the rotated input, float32; applied twice it restores the weight to one ulp of a
    group's largest value."""
    return (_turned(weight.double(), size, 1) * size**-0.5).float() if size else weight


def _turned(x: Tensor, size: int, dim: int) -> Tensor:
    """Return the products with Sylvester's matrix of ones and minus ones."""
    half = 1
    while half < size:
        low, high = x.unflatten(dim, (-1, 2, half)).unbind(dim + 1)
        x = torch.stack([low + high, low - high], dim + 1).flatten(dim, dim + 2)
        half *= 2
    return x

"""Weights in the layout that the kernels read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqtool.runtimes.cpu import library

__all__ = ["PackedWeight", "pack_weight", "worth_winograd"]


NARROW = 63
"""Largest code whose Winograd transform fits a byte on AVX2: 4 * 63 = 252. Above it, both operands are transformed in 16 bits."""

MOST = 2**31 // (4 * 255) - 1
"""Largest sum of the magnitudes of a column whose transformed sum, four times the product, fits 32 bits for codes of 8 bits."""


class PackedWeight(NamedTuple):
    """A weight in the kernels' layout, int8; the sums of its columns, int32; whether it is Winograd-transformed; and its
    largest code."""

    packed: Tensor
    sums: Tensor
    winograd: bool
    largest: int


def worth_winograd(out_channels: int, in_channels: int, shape: tuple[int, ...]) -> bool:
    """Return whether a transformed weight is faster at the output size `(N, H, W)`.

    With VNNI, where weights outweigh activations, memory decides, and the transformed weight is larger. On AVX2 the products
    always take longer.
    """
    if not library.has_vnni():
        return True
    tiles = shape[0] * -(-shape[1] // 2) * -(-shape[2] // 2)
    return -(-out_channels // 16) * 16 * in_channels <= 1 << 19 or tiles >= 128


def pack_weight(
    weight: Tensor, zero_points: Tensor | None, bits: int, sizes: tuple[int, int, int, int], gates: int, winograd: int
) -> PackedWeight:
    """Pack centred int8 codes `[C_out, ...]` (without `zero_points`), or packed words int32 of `bits` bits with their zero
    points, uint8 `[C_out]`.

    `sizes` are out-channels, in-channels, taps and the bytes of a pixel's codes. `gates` columns gate as many others that
    come before them. `winograd` is the largest code of an input whose transform is wanted, or 0. It is not made where
    transformed weights would not fit a byte. Above `NARROW` the weight is laid out as for other convolutions, and transformed
    in each call.
    """
    kernels: Any = library.get()
    assert kernels is not None
    out_channels, in_channels, taps, channel_bytes = sizes
    columns = -(-out_channels // 16) * 16
    weight = weight.contiguous()
    if zero_points is None:
        given: tuple = (weight.data_ptr(), None, 0, 8, None)
    else:
        zero_points = zero_points.contiguous()
        given = (None, weight.data_ptr(), weight.shape[1] * 4, bits, zero_points.data_ptr())
    in_call = winograd > NARROW and not library.has_vnni()
    if winograd and not in_call:
        packed = torch.empty(columns * channel_bytes * 16, dtype=torch.int8)
        sums = torch.empty(columns * 17, dtype=torch.int32)  # and how many channels each may add up in 16 bits
        into = (packed.data_ptr(), sums.data_ptr())
        if kernels.dq_winograd_pack(*given, *into, out_channels, in_channels, winograd):
            return PackedWeight(packed, sums, True, 128)
    packed = torch.empty(columns * channel_bytes * taps, dtype=torch.int8)
    sums = torch.empty(columns, dtype=torch.int32)
    largest = kernels.dq_pack(*given, packed.data_ptr(), sums.data_ptr(), out_channels, in_channels, taps, gates)
    return PackedWeight(packed, sums, in_call and _largest_sum(packed, columns) <= MOST, int(largest))


def _largest_sum(packed: Tensor, columns: int) -> int:
    """Return the largest sum of the magnitudes of a column."""
    blocks = packed.view(columns // 16, -1, 16, 4)
    above, below = (t.sum((1, 3), dtype=torch.int32) for t in (blocks.clamp(min=0), blocks.clamp(max=0)))
    return int((above - below).max())

"""Weights in the layout that the kernels read."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dqtool.runtimes.cpu import library

__all__ = ["PackedWeight", "expanded", "pack_weight", "worth_winograd"]


NARROW = 63
"""Largest code whose Winograd transform fits a byte on AVX2: 4 * 63 = 252. Above it, both operands are transformed in 16 bits."""

MOST = 2**31 // (4 * 255) - 1
"""Largest sum of the magnitudes of a column whose transformed sum, four times the product, fits 32 bits for codes of 8 bits."""


class PackedWeight(NamedTuple):
    """A weight in the kernels' layout, int8; the sums of its columns, int32; whether it is Winograd-transformed; its largest
    code; and the lowest code of each column, int8, where two codes share a byte, else None."""

    packed: Tensor
    sums: Tensor
    winograd: bool
    largest: int
    lows: Tensor | None = None


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
    weight: Tensor,
    zero_points: Tensor | None,
    bits: int,
    sizes: tuple[int, int, int, int],
    gates: int,
    winograd: int,
    compact: bool = False,
) -> PackedWeight:
    """Pack centred int8 codes `[C_out, ...]` (without `zero_points`), or packed words int32 of `bits` bits with their zero
    points, uint8 `[C_out]`.

    `sizes` are out-channels, in-channels, taps and the bytes of a pixel's codes. `gates` columns gate as many others that
    come before them. `winograd` is the largest code of an input whose transform is wanted, or 0. It is not made where
    transformed weights would not fit a byte. Above `NARROW` the weight is laid out as for other convolutions, and transformed
    in each call. `compact` asks for two codes a byte, which codes that lie further apart than 15 don't get.
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
    transformed = None
    in_call = winograd > NARROW and not library.has_vnni()
    if winograd and not in_call:
        packed = torch.empty(columns * channel_bytes * 16, dtype=torch.int8)
        sums = torch.empty(columns * 17, dtype=torch.int32)  # and how many channels each may add up in 16 bits
        into = (packed.data_ptr(), sums.data_ptr())
        if kernels.dq_winograd_pack(*given, *into, out_channels, in_channels, winograd):
            transformed = PackedWeight(packed, sums, True, 128)
            if not compact:
                return transformed
    packed = torch.empty(columns * channel_bytes * taps, dtype=torch.int8)
    sums = torch.empty(columns, dtype=torch.int32)
    largest = kernels.dq_pack(*given, packed.data_ptr(), sums.data_ptr(), out_channels, in_channels, taps, gates)
    if compact:
        halves = torch.empty(packed.numel() // 2, dtype=torch.uint8)
        lows = torch.empty(columns, dtype=torch.int8)
        rows = channel_bytes * taps // 4
        if kernels.dq_compact(packed.data_ptr(), halves.data_ptr(), lows.data_ptr(), columns // 16, rows):
            if transformed is not None:
                return transformed._replace(packed=halves, lows=lows)
            fits = in_call and _largest_sum(packed, columns) <= MOST
            return PackedWeight(halves, sums, fits, int(largest), lows)
        if transformed is not None:
            return transformed
    return PackedWeight(packed, sums, in_call and _largest_sum(packed, columns) <= MOST, int(largest))


def expanded(halves: Tensor, sums: Tensor, lows: Tensor) -> tuple[Tensor, Tensor]:
    """Return a compact weight with one code a byte, as for any convolution, and the sums of its columns."""
    blocks = len(lows) // 16
    two = halves.view(blocks, -1, 32)
    codes = torch.cat([two & 15, two >> 4], 2).view(torch.int8) + lows.view(blocks, 16).repeat_interleave(4, 1)[:, None]
    if len(sums) > len(lows):  # a Winograd transform has these: its plane 5 sums the nine taps
        sums = sums[: 16 * len(lows)].view(blocks, 16, 16)[:, 5].flatten()
    return codes.flatten(), sums


def _largest_sum(packed: Tensor, columns: int) -> int:
    """Return the largest sum of the magnitudes of a column."""
    blocks = packed.view(columns // 16, -1, 16, 4)
    above, below = (t.sum((1, 3), dtype=torch.int32) for t in (blocks.clamp(min=0), blocks.clamp(max=0)))
    return int((above - below).max())

"""Weights in GPU memory: codes of 2 to 7 bits in bit planes that a kernel unpacks with shifts and masks, 8-bit codes as bytes.

A plane holds 4, 2 or 1 bits of each code, and a width takes the planes that add up to it (6 bits: 4 + 2). The K codes of an
out-channel are cut into halves of a chunk. In a plane of `p` bits, `8 / p` halves that follow each other lie above each other in as
many bytes as a half has codes: half `q` takes the bits from `q % (8 / p) * p` on. A kernel reads a run of bytes and gets the codes
of one half by one shift, the same for all. Rows end with a whole byte for each code, so a row whose halves are no multiple of
`8 / p` takes some more than its bits; planes of 4 bits never do.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PLANES", "chunk_of", "pack_planes", "padded_channels", "plane_bytes", "plane_row", "unpack_planes"]

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
"""Widths of the planes of a code, from its lowest bits up."""

ALIGNMENT = 64
"""Codes of a pixel are padded to a multiple of this: two halves of a chunk that tensor cores multiply, 32 codes each."""


def padded_channels(channels: int) -> int:
    """Return the number of codes that a pixel of one group takes."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


def chunk_of(row: int) -> int:
    """Return the codes of a chunk for pixels of `row` codes: 128 where it divides them, else 64."""
    return 128 if row % 128 == 0 else ALIGNMENT


def plane_row(k: int, width: int, chunk: int) -> int:
    """Return the bytes of an out-channel of `k` codes in a plane of `width` bits."""
    half = chunk // 2
    return -(-(k // half) // (8 // width)) * half


def plane_bytes(out_channels: int, k: int, bits: int, chunk: int) -> int:
    """Return the bytes of a weight of `out_channels` rows of `k` codes."""
    return out_channels * (k if bits == 8 else sum(plane_row(k, width, chunk) for width in PLANES[bits]))


def pack_planes(codes: Tensor, bits: int, chunk: int) -> Tensor:
    """Pack codes uint8 `[C_out, K]`, K a multiple of `chunk`, into planes one after another, uint8 `[plane_bytes]`.

    Codes of 8 bits stay bytes.
    """
    rows, k = codes.shape
    if bits == 8:
        return codes.contiguous().flatten()
    half, planes, low = chunk // 2, [], 0
    for width in PLANES[bits]:
        slots = 8 // width
        part = codes >> low & (1 << width) - 1
        part = F.pad(part, (0, plane_row(k, width, chunk) * slots - k)).view(rows, -1, slots, half)
        byte = torch.zeros_like(part[:, :, 0])
        for slot in range(slots):
            byte |= part[:, :, slot] << slot * width
        planes.append(byte.flatten())
        low += width
    return torch.cat(planes)


def unpack_planes(packed: Tensor, bits: int, chunk: int, rows: int, k: int) -> Tensor:
    """Return the codes uint8 `[rows, k]` of `pack_planes`."""
    if bits == 8:
        return packed.view(rows, k)
    codes = torch.zeros(rows, k, dtype=torch.uint8, device=packed.device)
    start = low = 0
    for width in PLANES[bits]:
        size = rows * plane_row(k, width, chunk)
        byte = packed[start : start + size].view(rows, -1, 1, chunk // 2)
        slots = [(byte >> slot * width & (1 << width) - 1) << low for slot in range(8 // width)]
        codes |= torch.cat(slots, 2).view(rows, -1)[:, :k]
        start, low = start + size, low + width
    return codes


def arrange(codes: Tensor, zero_points: Tensor, groups: int) -> Tensor:
    """Return the codes uint8 `[C_out, C_in / groups, ...]` of a weight as rows `[C_out, K]` that follow the pixels of its input.

    K counts the taps and in each the padded channels. Padding holds the zero point `[C_out]`: it multiplies as zero.
    """
    rows, channels = codes.shape[:2]
    taps = codes.flatten(2) if codes.dim() > 2 else codes.unsqueeze(2)
    taps = taps.transpose(1, 2)  # [C_out, taps, C_in / groups]
    spare = padded_channels(channels) - channels
    if spare:
        padding = zero_points.view(-1, 1, 1).expand(rows, taps.shape[1], spare)
        taps = torch.cat([taps, padding], 2) if taps.numel() else F.pad(taps, (0, spare))
    return taps.reshape(rows, -1).contiguous()

"""Weights in GPU memory: codes of 2 to 7 bits in bit planes that a kernel unpacks with shifts and masks, 8-bit codes as bytes.

A plane holds 4, 2 or 1 bits of each code, and a width takes the planes that add up to it (6 bits: 4 + 2), so a weight takes
exactly its bits. The K codes of an out-channel are cut into chunks of `chunk` codes. Within a chunk, a plane of `p` bits stores
code `e` in byte `e % bytes`, at bit `e // bytes * p`, where `bytes = chunk * p / 8`. Neighbouring bytes then hold neighbouring
codes: a kernel reads a run of bytes and gets runs of codes by shifting them all alike.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PLANES", "chunk_of", "pack_planes", "padded_channels", "plane_bytes", "unpack_planes"]

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


def plane_bytes(out_channels: int, k: int, bits: int) -> int:
    """Return the bytes of a weight of `out_channels` rows of `k` codes."""
    return out_channels * k * bits // 8


def pack_planes(codes: Tensor, bits: int, chunk: int) -> Tensor:
    """Pack codes uint8 `[C_out, K]`, K a multiple of `chunk`, into planes one after another, uint8 `[C_out * K * bits / 8]`.

    Codes of 8 bits stay bytes.
    """
    rows, k = codes.shape
    if bits == 8:
        return codes.contiguous().flatten()
    chunks = codes.view(rows, k // chunk, chunk)
    planes, low = [], 0
    for width in PLANES[bits]:
        part = (chunks >> low & (1 << width) - 1).unflatten(2, (8 // width, chunk * width // 8))
        byte = torch.zeros_like(part[:, :, 0])
        for slot in range(8 // width):
            byte |= part[:, :, slot] << slot * width
        planes.append(byte.flatten())
        low += width
    return torch.cat(planes)


def unpack_planes(packed: Tensor, bits: int, chunk: int, rows: int, k: int) -> Tensor:
    """Return the codes uint8 `[rows, k]` of `pack_planes`."""
    if bits == 8:
        return packed.view(rows, k)
    codes = torch.zeros(rows, k // chunk, chunk, dtype=torch.uint8, device=packed.device)
    start = low = 0
    for width in PLANES[bits]:
        size = rows * k * width // 8
        byte = packed[start : start + size].view(rows, k // chunk, -1)
        parts = [(byte >> slot * width & (1 << width) - 1) << low for slot in range(8 // width)]
        codes |= torch.cat(parts, 2)
        start, low = start + size, low + width
    return codes.view(rows, k)


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

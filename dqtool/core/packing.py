"""Dense bit packing: codes of 1 to 8 bits, LSB first, without padding bits inside a row.

Bit `i` of code `c` of a row is bit `c * bits + i` of that row's stream. Bit `p` of the stream is bit `p % 32` of the
row's int32 word `p // 32`. Every row starts at a word boundary, and its last word is padded with zeros. A 6-bit code
may therefore straddle two words and still takes 6 bits only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.errors import ArtifactError

__all__ = ["pack", "packed_words", "unpack"]

# Codes packed or unpacked at once. The temporaries take a few bytes per code.
CHUNK = 1 << 24


def packed_words(n: int, bits: int) -> int:
    """Return `ceil(n * bits / 32)`, the number of int32 words that `n` codes take.

    Raises:
        ValueError: `bits` is not 1 to 8.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"codes have 1 to 8 bits, not {bits}")
    return -(-n * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes `[rows, n]` in `[0, 2^bits - 1]` into int32 `[rows, ceil(n * bits / 32)]`.

    Raises:
        ValueError: the codes are out of range, not integers or not a matrix, which is a bug of the caller.
    """
    words = packed_words(codes.shape[-1], bits)
    if codes.ndim != 2 or codes.dtype.is_floating_point or codes.dtype == torch.bool:
        raise ValueError(f"codes must be an integer matrix, got {codes.dtype} {tuple(codes.shape)}")
    rows, n = codes.shape
    if codes.numel() == 0:
        return torch.zeros(rows, words, dtype=torch.int32, device=codes.device)
    low, high = int(codes.min()), int(codes.max())  # Python integers, since 256 wraps around in a uint8 comparison
    if low < 0 or high >= 2**bits:
        raise ValueError(f"{bits}-bit codes must lie in [0, {2**bits - 1}], got {low} to {high}")
    count, size = _period(bits)
    periods = -(-n // count)
    packed = torch.zeros(rows, words * 4, dtype=torch.uint8, device=codes.device)
    for start, stop in _chunks(rows, n):
        part = F.pad(codes[start:stop].to(torch.uint8), (0, periods * count - n)).view(-1, periods, count)
        out = torch.zeros(stop - start, periods, size, dtype=torch.uint8, device=codes.device)
        for i in range(count):
            byte, offset = divmod(i * bits, 8)
            out[..., byte] |= part[..., i] << offset  # bits shifted out of this byte ...
            if offset + bits > 8:
                out[..., byte + 1] |= part[..., i] >> (8 - offset)  # ... start the next one
        width = min(words * 4, periods * size)
        packed[start:stop, :width] = out.flatten(1)[:, :width]
    # Byte b of a little-endian word holds its bits 8b..8b+7, so the byte stream equals the word stream.
    return packed.view(torch.int32)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the codes, uint8 `[rows, n]`, of a packed int32 tensor `[rows, ceil(n * bits / 32)]`.

    Raises:
        ArtifactError: the packed tensor is not int32 of that width.
    """
    words = packed_words(n, bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words:
        raise ArtifactError(
            f"Packed {bits}-bit codes of {n} inputs must be int32 [rows, {words}], got {packed.dtype} "
            f"{tuple(packed.shape)}.",
            fix="The file is damaged or of another format: export it again.",
        )
    rows = packed.shape[0]
    count, size = _period(bits)
    periods = -(-n // count)
    mask = 2**bits - 1
    stream = packed.contiguous().view(torch.uint8)
    codes = torch.empty(rows, n, dtype=torch.uint8, device=packed.device)
    for start, stop in _chunks(rows, n):
        part = stream[start:stop, : periods * size]
        part = F.pad(part, (0, periods * size - part.shape[1])).view(-1, periods, size)
        out = torch.empty(stop - start, periods, count, dtype=torch.uint8, device=packed.device)
        for i in range(count):
            byte, offset = divmod(i * bits, 8)
            value = part[..., byte] >> offset
            if offset + bits > 8:
                value |= part[..., byte + 1] << (8 - offset)
            out[..., i] = value.bitwise_and_(mask)
        codes[start:stop] = out.flatten(1)[:, :n]
    return codes


def _period(bits: int) -> tuple[int, int]:
    """Return (codes, bytes) after which the layout repeats: the least common multiple of 8 and `bits` bits, 8 codes at
    most."""
    total = math.lcm(8, bits)
    return total // bits, total // 8


def _chunks(rows: int, n: int) -> list[tuple[int, int]]:
    """Return (start, stop) of row ranges with about `CHUNK` codes each."""
    step = max(1, CHUNK // max(1, n))
    return [(start, min(rows, start + step)) for start in range(0, rows if n else 0, step)]

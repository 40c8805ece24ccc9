"""Sizes of the blocks that a GPU's processors compute, chosen by a model of occupancy and traffic.

Under Triton's interpreter a block is about as large as the problem: every block costs as much as many elements.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dqtool.runtimes.cuda.model import Gpu, best_tile, gpu_of

__all__ = ["Tile", "attention_tile", "block_elements", "gpu_at", "power_of_two", "product_tile", "statistics_split"]


class Tile(NamedTuple):
    """A block of `rows` times `columns` results, computed by `warps` warps with `stages` loads in flight. `splits` blocks share the
    codes of each result."""

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1
    assembly: bool = True
    """Unpack codes by machine instructions, four at once."""


AT_ONCE = 2048
"""Elements of a block of the element-wise kernels."""

INTERPRETED_AT_ONCE = 1 << 16
"""The same under the interpreter, whose cost is that of the blocks' number."""


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()


def _interpreted() -> bool:
    return bool(triton.knobs.runtime.interpret)


def block_elements() -> int:
    """Return how many elements a block of an element-wise kernel takes."""
    return INTERPRETED_AT_ONCE if _interpreted() else AT_ONCE


def _between(n: int, least: int, most: int) -> int:
    return max(least, min(most, power_of_two(n)))


@functools.cache
def gpu_at(device: torch.device) -> Gpu:
    """Return the rates of a device: the known ones of its model, with the device's own processors and shared memory."""
    if device.type != "cuda":
        return gpu_of("")
    from triton.runtime import driver

    index = torch.cuda.current_device() if device.index is None else device.index
    found: Any = driver.active.utils.get_device_properties(index)  # the limit that Triton itself checks
    known = gpu_of(torch.cuda.get_device_name(device))
    return replace(known, processors=found["multiprocessor_count"], shared=found["max_shared_mem"] // 1024)


def product_tile(m: int, n: int, k: int, bits: int, gated: bool, codes: Tensor) -> Tile:
    """Return the block for a product of `m` rows and `n` columns over `k` codes."""
    if _interpreted():
        splits = 1 if m > 16 or gated or k < 512 else 2
        return Tile(_between(m, 16, 128), _between(n, 16, 64), 4, 1, splits, assembly=False)
    return Tile(*best_tile(gpu_at(codes.device), m, n, k, bits, gated))


def attention_tile(queries: int, keys: int, width: int) -> Tile:
    """Return the block of queries and keys for heads of `width` channels."""
    if _interpreted():
        return Tile(_between(queries, 16, 64), _between(keys, 32, 64), 4, 1)
    if width > 128:
        return Tile(64, 32, 8, 2)
    return Tile(128, 64, 8, 2) if queries > 64 else Tile(64, 64, 4, 2)


def statistics_split(groups: int, pixels: int) -> int:
    """Return into how many chunks the pixels of each of `groups` groups are cut: a power of two, at most 16."""
    split = 1
    while split < 16 and groups * split < 512 and pixels // (2 * split) >= 64:
        split *= 2
    return split

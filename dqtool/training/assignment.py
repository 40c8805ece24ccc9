"""Division of blocks among processes that train them at once. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["assign", "block_macs", "longest_share"]


def block_macs(blocks: Sequence[str], macs: Sequence[tuple[str, int]]) -> list[int]:
    """Return the multiply-accumulates of each block, given those of each layer by name. An attention product has the name of
    its module."""
    return [sum(each for name, each in macs if name == block or name.startswith(f"{block}.")) for block in blocks]


def assign(costs: Sequence[float], processes: int) -> list[int]:
    """Return the process of each unit of work: the costliest first, each to the process that has least to do so far."""
    load = [0.0] * processes
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        process = min(range(processes), key=lambda p: (load[p], p))
        found[index] = process
        load[process] += costs[index]
    return found


def longest_share(costs: Sequence[float], processes: int) -> float:
    """Return the part of all work that the process with the most of it does."""
    load = [0.0] * processes
    for cost, process in zip(costs, assign(costs, processes), strict=True):
        load[process] += cost
    return max(load) / (sum(costs) or 1.0)

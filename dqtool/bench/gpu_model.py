"""Predicted times of a network's products on a GPU, by the model of occupancy and bytes that chooses their blocks."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from dqtool.artifacts.bench_report import KernelRow
from dqtool.runtimes.cuda.model import Gpu, best_tile, estimate

__all__ = ["kernel_rows", "recorded_products"]


def recorded_products(network: nn.Module, arguments: dict[str, Any]) -> Counter[tuple[int, int, int, int, int, bool]]:
    """Run one step and return how often it multiplies each shape: rows, columns, codes, taps, bits, and whether gated (GEGLU)."""
    import torch

    from dqtool.runtimes.cuda import launch

    found: Counter[tuple[int, int, int, int, int, bool]] = Counter()
    own: Any = launch.multiply_codes

    def counted(codes: Any, *rest: Any, **options: Any) -> Any:
        shape, g = rest[6], rest[7]
        act = rest[11] if len(rest) > 11 else options.get("act", 0)
        gated = act == launch.GEGLU
        rows = 1
        for size in shape:
            rows *= size
        columns = g.out_channels // g.groups // (2 if gated else 1)
        found[rows, columns, g.k, g.kernel_h * g.kernel_w, g.bits, gated] += g.groups
        return own(codes, *rest, **options)

    launch.multiply_codes = counted
    try:
        with torch.no_grad():
            network(**arguments, return_dict=False)
    finally:
        launch.multiply_codes = own
    return found


def kernel_rows(gpu: Gpu, products: Counter[tuple[int, int, int, int, int, bool]]) -> list[KernelRow]:
    """Return a row for each shape of product, the costliest first."""
    rows = []
    for (m, n, k, taps, bits, gated), count in products.items():
        *tile, splits = best_tile(gpu, m, n, k, bits, gated)
        sizes = (tile[0], tile[1], tile[2], tile[3])
        e = estimate(gpu, m, n, k, bits, gated, sizes, 2, taps, splits)
        block = f"{tile[0]}x{tile[1]}" + (f" in {splits} parts" if splits > 1 else "")
        rows.append(KernelRow(count, m, n * (2 if gated else 1), k, block, count * e.seconds, e.reached, e.bound))
    return sorted(rows, key=lambda row: -row.seconds)

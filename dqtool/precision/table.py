"""The frontier as a table. No torch: cached reports are shown without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dqtool import report

__all__ = ["print_frontier"]


def print_frontier(rows: Sequence[Mapping[str, Any]]) -> None:
    """Show the frontier as a table."""
    report.table(
        "frontier: predicted PSNR of samples, before training",
        ["bits", "PSNR", "measured", "weights, MB", "giga bit operations"],
        [
            (
                row["bits"],
                f"{row['psnr']:.1f}",
                f"{row['measured_psnr']:.1f}" if "measured_psnr" in row else "-",
                f"{row['weight_bytes'] / 1e6:.2f}",
                f"{row['bops'] / 1e9:.4g}",
            )
            for row in rows
        ],
    )

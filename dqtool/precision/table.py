"""The frontier as a table. No torch: cached reports are shown without it."""

from __future__ import annotations

from collections.abc import Sequence

from dqtool import report
from dqtool.artifacts.records import PlanRecord

__all__ = ["print_frontier"]


def print_frontier(rows: Sequence[PlanRecord]) -> None:
    """Show the frontier as a table."""
    report.table(
        "frontier: predicted PSNR of samples, before training",
        ["bits", "PSNR", "measured", "weights, MB", "giga bit operations"],
        [
            (
                row.bits,
                f"{row.psnr:.1f}",
                "-" if row.measured_psnr is None else f"{row.measured_psnr:.1f}",
                f"{row.weight_bytes / 1e6:.2f}",
                f"{row.bops / 1e9:.4g}",
            )
            for row in rows
        ],
    )

"""The chart of a table that has curves (training losses): an SVG that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqtool.page.comparison import curve_chart
from dqtool.page.style import CHART_STYLE

__all__ = ["curve_figure"]


def curve_figure(summary: Mapping[str, Any]) -> str | None:
    """The chart with its style inside; None without curves."""
    chart = curve_chart(summary)
    return None if chart is None else chart.replace(">", f"><style>{CHART_STYLE}</style>", 1) + "\n"

"""The chart of a table that has curves (training losses): an SVG that stands alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dqtool.page.charts import Line, lines
from dqtool.page.style import CHART_STYLE

__all__ = ["curve_chart", "curve_figure"]


def curve_chart(summary: Mapping[str, Any]) -> str | None:
    """Means over seeds of every row's curve, as a page shows it; None where no row has one."""
    series: list[Line] = []
    for row in summary["rows"]:
        curves = row["curves"]
        if curves:
            length = min(len(curve) for curve in curves)
            mean = [sum(curve[i] for curve in curves) / len(curves) for i in range(length)]
            name = " ".join(filter(None, (row["group"], row["name"])))
            series.append(Line(name, [100 * (i + 1) / length for i in range(length)], mean, len(series)))
    if not series:
        return None
    return lines(summary["title"], "share of the iterations, %", "training loss", series)


def curve_figure(summary: Mapping[str, Any]) -> str | None:
    """The same with its style inside."""
    chart = curve_chart(summary)
    return None if chart is None else chart.replace(">", f"><style>{CHART_STYLE}</style>", 1) + "\n"

"""Figures: the numbers that metrics report, with label, better direction and format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dqtool.artifacts.jsonvalues import JsonObject

__all__ = ["Figure", "value_of"]


@dataclass(frozen=True)
class Figure:
    """Number of a report.

    Attributes:
        key: key in the report of `dqtool eval`, where a figure with several statistics is a mapping with a `mean`.
        better: -1 if lower is better, 1 if higher is better, 0 if neither.
        decimals: digits after the point in tables.
        scale: factor of the value in tables.
        column: name in the YAML of a table, if it differs from the key.
        compares: the figure compares with the reference, so the reference itself has none.
    """

    key: str
    label: str
    better: int = 0
    decimals: int = 2
    scale: float = 1.0
    column: str = ""
    compares: bool = False

    @property
    def column_name(self) -> str:
        """Name that tables use."""
        return self.column or self.key

    @property
    def heading(self) -> str:
        """Label with an arrow in the better direction."""
        return self.label + {-1: " ↓", 0: "", 1: " ↑"}[self.better]

    def text(self, value: float, deviation: float | None = None) -> str:
        """Return the value, with its deviation if given, as tables show it."""
        shown = f"{value * self.scale:.{self.decimals}f}"
        return shown if deviation is None else f"{shown} ± {deviation * self.scale:.{self.decimals}f}"


def value_of(figures: JsonObject, key: str) -> float | None:
    """Return a figure of a report: the number, or the `mean` of a figure with several statistics; None if it is
    missing."""
    value = figures.get(key)
    if isinstance(value, Mapping):
        value = value.get("mean")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

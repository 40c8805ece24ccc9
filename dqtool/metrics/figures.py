"""Figures: the numbers that metrics report, with their labels, their better side and how they are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Figure", "value_of"]


@dataclass(frozen=True)
class Figure:
    """A number of a report.

    `key` is its key in the report of `dqtool eval`, where a figure with several statistics is a mapping with a `mean`.
    `better` is -1 where lower is better, 1 where higher is better, 0 where neither is. A table shows `scale` times the value
    with `decimals` digits. `column` names the figure in the YAML of a table, where that differs from the key.
    """

    key: str
    label: str
    better: int = 0
    decimals: int = 2
    scale: float = 1.0
    column: str = ""
    compares: bool = False
    """The figure compares with the reference, so that the reference has none of its own."""

    @property
    def column_name(self) -> str:
        """The name that tables use."""
        return self.column or self.key

    @property
    def heading(self) -> str:
        """The label with an arrow to the better side."""
        return self.label + {-1: " ↓", 0: "", 1: " ↑"}[self.better]

    def text(self, value: float, deviation: float | None = None) -> str:
        """Return the value, with its deviation if given, as a table shows it."""
        shown = f"{value * self.scale:.{self.decimals}f}"
        return shown if deviation is None else f"{shown} ± {deviation * self.scale:.{self.decimals}f}"


def value_of(figures: Mapping[str, Any], key: str) -> float | None:
    """Return a figure of a report: the number, or the `mean` of a figure with several statistics. None where there is none."""
    value = figures.get(key)
    if isinstance(value, Mapping):
        value = value.get("mean")
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

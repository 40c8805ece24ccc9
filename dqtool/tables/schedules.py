"""Schedules of tables: the length of training and the number of images. All cells of a table have the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SCHEDULES", "Schedule"]

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Schedule:
    """A schedule.

    Attributes:
        name: name in tables and on the command line.
        summary: description that results carry.
        options: options of the stages by field name.
        share: iterations of `distill`, as a share of the training method's defaults.
    """

    name: str
    summary: str
    options: Options = field(default_factory=dict)
    share: float = 1.0


FULL = Schedule("full", "every training method with its defaults", {"eval": {"samples": 4096}})
SHORT = Schedule(
    "short",
    "every training method with a fifth of its default iterations",
    {"calibrate": {"samples": 1280}, "eval": {"samples": 2048}},
    share=0.2,
)
SMOKE = Schedule(
    "smoke",
    "a hundredth of the default iterations: to see that everything runs, not to compare",
    {"calibrate": {"samples": 40}, "eval": {"samples": 16}},
    share=0.01,
)

SCHEDULES = {each.name: each for each in (FULL, SHORT, SMOKE)}
"""Schedules by name."""

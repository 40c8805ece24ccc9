"""How long the cells of a table train and how many images they are judged on. One schedule holds for all of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["SCHEDULES", "Schedule"]

Options = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Schedule:
    """`options` of the stages, and by training method those of `distill` (field names); a method without an entry trains
    as long as its defaults say, times `share`."""

    name: str
    says: str
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
"""By name, as tables call them."""

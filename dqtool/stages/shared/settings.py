"""Options that all commands take, and the log of the stages that ran. `dqtool --help` imports it: it stays light."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dqtool.errors import UsageError

__all__ = ["Execution", "RunSettings", "check_values"]

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


def check_values(values: Mapping[str, Any]) -> None:
    """Check options by name, wherever they come from: numbers are finite, texts are without NUL, outputs one line each.

    Raises:
        UsageError: names the option.
    """
    for name, value in values.items():
        where = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{value} is no number to work with", where=where, fix="Give a finite number")
        if type(value) is int and abs(value) >= 1 << 62:
            raise UsageError("This whole number is too large", where=where, fix="Give one below 2^62")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise UsageError("This text holds a NUL character", where=where)
        if name == "output" and isinstance(value, str) and _CONTROL.search(value):
            raise UsageError(
                "The name of an output is passed on in one line, and this one holds a control character",
                where=where,
                fix="Choose another name",
            )


@dataclass(frozen=True)
class Execution:
    """Record of one stage that ran, or would run in a dry run. `cached`: the output existed already."""

    stage: str
    output: str
    parameters: dict[str, Any]
    inputs: list[dict[str, Any]]
    cached: bool


@dataclass(frozen=True)
class RunSettings:
    """Options that every command takes, and the log of the stages that ran under them."""

    force: bool = False
    quiet: bool = False
    json: bool = False
    device: str = "auto"
    dry_run: bool = False
    overwrite: bool = False
    reads: tuple[str, ...] = ()
    """Files that the whole command reads beside what its options name: a recipe and its model."""
    log: list[Execution] = field(default_factory=list, compare=False)
    summary: dict[str, Any] = field(default_factory=dict, compare=False)
    """Findings of the whole command, which `--json` adds to its result."""

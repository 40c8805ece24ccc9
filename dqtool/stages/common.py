"""What every command is told and what it leaves behind. Light: `dqtool --help` imports it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Common", "Execution"]


@dataclass(frozen=True)
class Execution:
    """What `execute` did, or would do in a dry run; `cached` says that the output was there already."""

    stage: str
    output: str
    parameters: dict[str, Any]
    inputs: list[dict[str, Any]]
    cached: bool


@dataclass(frozen=True)
class Common:
    """Options that every command takes, and the log of what was executed under them."""

    force: bool = False
    quiet: bool = False
    json: bool = False
    device: str = "auto"
    dry_run: bool = False
    log: list[Execution] = field(default_factory=list, compare=False)

"""Options that all commands take, and the log of the stages that ran. `dqtool --help` imports it: it stays light."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from dqtool.errors import UsageError
from dqtool.stages.options.declared import GENERAL, RESOURCES, Option

if TYPE_CHECKING:  # `dqtool --help` needs no records, and their classes take 50 ms.
    from dqtool.artifacts.jsonvalues import JsonObject
    from dqtool.artifacts.records import InputRecord

__all__ = ["Execution", "GeneralOptions", "RunSettings"]


@dataclass(frozen=True)
class Execution:
    """Record of one stage that ran, or would run in a dry run. `cached`: the output existed already."""

    stage: str
    output: str
    parameters: JsonObject
    inputs: list[InputRecord]
    cached: bool


@dataclass(frozen=True)
class GeneralOptions:
    """Options that every command takes."""

    force: Annotated[bool, Option("Do the work again even if its output is up to date.", panel=GENERAL)] = False
    quiet: Annotated[bool, Option("Print warnings and errors only.", panel=GENERAL)] = False
    json: Annotated[bool, Option("Print one JSON object to standard output, for scripts.", panel=GENERAL)] = False
    device: Annotated[
        str,
        Option("Device to compute on. auto takes a GPU if there is one.", "auto|cpu|cuda[:i]", panel=RESOURCES),
    ] = "auto"
    overwrite: Annotated[
        bool, Option("Replace files that dqtool did not write. Inputs are never replaced.", panel=GENERAL)
    ] = False
    dry_run: Annotated[bool, Option("Print the plan and write nothing.", panel=GENERAL)] = False
    debug: Annotated[bool, Option("Show tracebacks and the warnings of libraries.", panel=GENERAL)] = False

    def __post_init__(self) -> None:
        """Raise `UsageError` for a text that names no device."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(
                f"'{self.device}' is not a device", where="--device", fix="Choose auto, cpu, cuda or cuda:N"
            )


@dataclass(frozen=True)
class RunSettings(GeneralOptions):
    """Options that every command takes, and the log of the stages that ran under them."""

    reads: tuple[str, ...] = ()
    """Files that the whole command reads beside what its options name: a recipe and its model."""
    log: list[Execution] = field(default_factory=list, compare=False)
    summary: dict[str, Any] = field(default_factory=dict, compare=False)
    """Findings of the whole command, which `--json` adds to its result."""

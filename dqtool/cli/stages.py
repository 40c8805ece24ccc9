"""Commands of the stages, derived from the registry of stages."""

from __future__ import annotations

from typing import Any

import typer

from dqtool.cli.app import app, command
from dqtool.cli.output import run_stage
from dqtool.stages.registry import STAGES, Stage, options_class
from dqtool.stages.shared.settings import RunSettings

__all__ = ["add_stage"]


def add_stage(name: str, stage: Stage, group: typer.Typer = app) -> None:
    """Register a stage as a command."""

    def body(options: Any, settings: RunSettings) -> None:
        run_stage(name, options, settings)

    body.__doc__ = stage.help
    command(options_class(name), *stage.examples, group=group, name=name)(body)


for _name, _stage in STAGES.items():
    add_stage(_name, _stage)

"""Commands of the stages, derived from the options that each stage declares."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from dqtool.cli.app import app, command
from dqtool.cli.output import run_stage
from dqtool.stages.options.declared import Declared, declared_options
from dqtool.stages.registry import STAGES, Stage, options_class
from dqtool.stages.shared.settings import RunSettings

__all__ = ["add_stage"]


def add_stage(name: str, stage: Stage, group: typer.Typer = app) -> None:
    """Register a stage as a command with the options that its options class declares."""

    def body(settings: RunSettings, **values: Any) -> None:
        run_stage(name, settings, **values)

    own = [_parameter(each) for each in declared_options(options_class(name))]
    settings = inspect.Parameter("settings", inspect.Parameter.KEYWORD_ONLY, annotation=RunSettings)
    body.__signature__ = inspect.Signature([*own, settings])  # type: ignore[attr-defined]
    body.__doc__ = stage.help
    command(*stage.examples, group=group, name=name)(body)


def _parameter(declared: Declared) -> inspect.Parameter:
    """Return the parameter that Typer derives the option from."""
    option = declared.option
    kind: Any = declared.kind
    default = inspect.Parameter.empty if declared.default is dataclasses.MISSING else declared.default
    if kind is list:
        kind, default = (str if option.separated else list[str]) | None, None
    elif declared.optional:
        kind = kind | None
    shown: dict[str, Any] = {"help": option.help, "metavar": option.metavar, "hidden": option.hidden}
    if option.positional:
        info = typer.Argument(**shown)
    else:
        info = typer.Option(*_flags(declared), **shown, show_default=option.show_default, rich_help_panel=option.panel)
    return inspect.Parameter(
        declared.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def _flags(declared: Declared) -> tuple[str, ...]:
    """Return the option as it is typed. A switch has a `--no-` form only if None is one of its values."""
    long = declared.long
    if declared.kind is bool and declared.optional:
        long = f"{long}/--no-{long.removeprefix('--')}"
    return (long,) if declared.option.short is None else (long, declared.option.short)


for _name, _stage in STAGES.items():
    add_stage(_name, _stage)

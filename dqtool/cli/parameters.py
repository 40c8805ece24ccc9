"""Parameters of commands, derived from the options that a dataclass declares."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from dqtool.stages.options.declared import Declared, declared_options

__all__ = ["parameters_of"]


def parameters_of(options: type) -> list[inspect.Parameter]:
    """Return the parameters that Typer derives a command's arguments and options from."""
    return [_parameter(each) for each in declared_options(options)]


def _parameter(declared: Declared) -> inspect.Parameter:
    option = declared.option
    kind: Any = declared.kind
    default = inspect.Parameter.empty if declared.default is dataclasses.MISSING else declared.default
    if kind is list:
        kind = (str if option.separated else list[str]) | None
        default = ",".join(map(str, declared.default)) if option.separated and declared.default else None
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
    """Return the option as it is typed. A switch has a `--no-` form unless it is off by default."""
    long = declared.long
    if declared.kind is bool and declared.default is not False:
        long = f"{long}/--no-{long.removeprefix('--')}"
    return (long,) if declared.option.short is None else (long, declared.option.short)

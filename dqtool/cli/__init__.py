"""The command line. Each command parses its options, calls a stage and prints one line.

The commands of the stages are derived from the options that they declare; each other command is one file here. Nothing
heavy is imported, so that `dqtool --help` answers at once; the stages import torch when there is work.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from dqtool.cli.app import GENERAL_OPTIONS, app
from dqtool.errors import UsageError

__all__ = ["COMPLETION", "GENERAL_OPTIONS", "app", "invoke"]

ORDER = ("stages", "run", "inspect", "bench", "report")
"""Files of commands in the order of `dqtool --help`; files not named here come after them. `stages` adds all stages."""


def _position(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


for _name in sorted((info.name for info in pkgutil.iter_modules(__path__)), key=_position):
    import_module(f"{__name__}.{_name}")


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line, given without the program's name, and return the exit code.

    Raises:
        DqtoolError: a stage failed.
        UsageError: the command line can't be parsed.
    """
    root = typer.main.get_command(app)
    if COMPLETION in os.environ:
        return _complete(root)
    if not arguments:
        with root.make_context("dqtool", [], resilient_parsing=True) as context:
            print(root.get_help(context), file=sys.stderr)
        return 2
    try:
        with root.make_context("dqtool", list(arguments)) as context:
            root.invoke(context)
    except typer.Exit as finished:
        return finished.exit_code
    except USAGE_ERRORS as error:
        raise UsageError(error.format_message(), fix=_help_hint(error)) from error
    return 0


USAGE_ERRORS: Any = typer.BadParameter.__mro__[1]
"""click's UsageError, taken from typer: newer typers bring a copy of click, whose classes are not those of click."""

COMPLETION = "_DQTOOL_COMPLETE"
"""Environment variable in which the shell's completion script asks for completions."""


def _complete(root: Any) -> int:
    """Answer the shell's completion script; return the exit code."""
    from typer.completion import completion_init, shell_complete

    completion_init()
    return shell_complete(root, {}, "dqtool", COMPLETION, os.environ[COMPLETION])


def _help_hint(error: Any) -> str:
    path = error.ctx.command_path if error.ctx is not None else "dqtool"
    return f"`{path} --help` lists the options"

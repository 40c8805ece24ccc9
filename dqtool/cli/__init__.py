"""The command line: what can be typed. Each command parses, calls a stage and prints one line.

The stages' commands are derived from what they declare; any other command is a file here. Nothing heavy is imported, so that `dqtool --help` answers at once; the stages import torch when
there is work.
"""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import typer

from dqtool.cli.app import COMMON, app
from dqtool.errors import UsageError

__all__ = ["COMMON", "app", "invoke"]

ORDER = ("stages", "run", "inspect", "bench", "report")
"""The commands' files in the order of `dqtool --help`; others come after them. `stages` holds those of all stages."""


def _position(name: str) -> tuple[int, str]:
    return (ORDER.index(name) if name in ORDER else len(ORDER), name)


for _name in sorted((info.name for info in pkgutil.iter_modules(__path__)), key=_position):
    import_module(f"{__name__}.{_name}")


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line (without the program's name); returns the exit code.

    Raises:
        DqtoolError: whatever a stage raises.
        UsageError: the command line can't be understood.
    """
    root = typer.main.get_command(app)
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
"""click's UsageError: newer typers carry a copy of click of their own, so it is not where click is."""


def _help_hint(error: Any) -> str:
    path = error.ctx.command_path if error.ctx is not None else "dqtool"
    return f"`{path} --help` lists what there is"

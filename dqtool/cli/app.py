"""The application that commands register with, and the options that all of them take."""

from __future__ import annotations

import inspect as introspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dqtool import report
from dqtool.cli.help import PanelCommand
from dqtool.cli.parameters import parameters_of
from dqtool.cli.workers import SHARED_COMMANDS, ProcessOptions, run_in_processes
from dqtool.stages.options.declared import build_options, declared_options
from dqtool.stages.shared.settings import GeneralOptions, RunSettings

__all__ = ["GENERAL_OPTIONS", "app", "command"]

EPILOG = """\b
One model, five stages:
  dqtool zoo get digits-ddpm -o model
  dqtool dilate model | dqtool calibrate | dqtool distill --bits 4/4 | dqtool export | dqtool eval

Each command prints the path of its output to standard output, and everything else to standard error. Exit codes: 0 done
or cached, 2 usage, 3 bad artifact, 4 environment, 5 numbers (NaN, divergence), 130 interrupted."""

app = typer.Typer(
    name="dqtool",
    help="Quantize diffusion models to 4-8 bits: smaller files, faster steps, images that hold up (DilateQuant).",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Print the version if asked to."""
    if version:
        from dqtool import __version__

        print(f"dqtool {__version__}")
        raise typer.Exit


GENERAL_OPTIONS = tuple(each.name for each in declared_options(GeneralOptions))
"""Names of the options that every command takes."""

Body = Callable[[Any, RunSettings], None]
"""Function that runs a command with its own options and those that every command takes."""


def command(options: type, *examples: str, group: typer.Typer = app, name: str | None = None) -> Callable[[Body], Body]:
    """Return a decorator that registers a function as a command.

    The command takes the options that the dataclass `options` declares and `GENERAL_OPTIONS`. The function is called with
    an instance of the class and `RunSettings`; its docstring is the command's help, which `examples` end.
    """

    def register(body: Body) -> Body:
        called = name or body.__name__
        shared = group is app and called in SHARED_COMMANDS

        def callback(**values: Any) -> None:
            settings = RunSettings(**{key: values.pop(key) for key in GENERAL_OPTIONS})
            processes = build_options(ProcessOptions, {"nproc": values.pop("nproc", None)}).nproc
            report.set_quiet(settings.quiet)
            chosen = build_options(options, values)
            run_in_processes(lambda: body(chosen, settings), called, settings, processes)

        parameters = [*parameters_of(options), *parameters_of(GeneralOptions)]
        if shared:
            parameters += parameters_of(ProcessOptions)
        callback.__signature__ = introspect.Signature(parameters)  # type: ignore[attr-defined]
        callback.__annotations__ = {p.name: p.annotation for p in parameters}
        callback.__doc__, callback.__name__ = body.__doc__, body.__name__
        epilog = "\b\n" + "\n".join([f"Example{'s' * (len(examples) > 1)}:", *(f"  {each}" for each in examples)])
        group.command(called, cls=PanelCommand, epilog=epilog)(callback)
        return body

    return register

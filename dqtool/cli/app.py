"""The application that commands register with, and the options that all of them take."""

from __future__ import annotations

import inspect as introspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dqtool import report
from dqtool.cli.help import GENERAL, PanelCommand
from dqtool.errors import UsageError
from dqtool.stages.options.declared import RESOURCES
from dqtool.stages.shared.settings import RunSettings, check_values

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


def _general(flag: str, help: str) -> Any:
    return typer.Option(flag, help=help, rich_help_panel=GENERAL)


def general_options(
    force: Annotated[bool, _general("--force", help="Do the work again even if its output is up to date.")] = False,
    quiet: Annotated[bool, _general("--quiet", help="Print warnings and errors only.")] = False,
    json: Annotated[bool, _general("--json", help="Print one JSON object to standard output, for scripts.")] = False,
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda[:i]",
            help="Device to compute on. auto takes a GPU if there is one.",
            rich_help_panel=RESOURCES,
        ),
    ] = "auto",
    overwrite: Annotated[
        bool, _general("--overwrite", help="Replace files that dqtool did not write. Inputs are never replaced.")
    ] = False,
    dry_run: Annotated[bool, _general("--dry-run", help="Print the plan and write nothing.")] = False,
    debug: Annotated[bool, _general("--debug", help="Show tracebacks and the warnings of libraries.")] = False,
) -> RunSettings:
    """Apply the options that every command takes, and return them."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"'{device}' is not a device", where="--device", fix="Choose auto, cpu, cuda or cuda:N")
    report.set_quiet(quiet)
    return RunSettings(force=force, quiet=quiet, json=json, device=device, dry_run=dry_run, overwrite=overwrite)


GENERAL_OPTIONS = introspect.signature(general_options, eval_str=True).parameters


def command(*examples: str, group: typer.Typer = app, name: str | None = None) -> Callable[[Callable], Callable]:
    """Return a decorator that registers a function as a command.

    The command takes the function's own options and those that all commands take, and passes the latter as
    `settings`. `examples` end its help.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        own = introspect.signature(body, eval_str=True).parameters

        def callback(**values: Any) -> None:
            settings = general_options(**{key: values.pop(key) for key in GENERAL_OPTIONS})
            check_values(values)
            body(**values, settings=settings)

        parameters = [p for p in own.values() if p.name != "settings"] + list(GENERAL_OPTIONS.values())
        keyword_only = [p.replace(kind=introspect.Parameter.KEYWORD_ONLY) for p in parameters]
        callback.__signature__ = introspect.Signature(keyword_only)  # type: ignore[attr-defined]
        callback.__annotations__ = {p.name: p.annotation for p in parameters}
        callback.__doc__, callback.__name__ = body.__doc__, body.__name__
        epilog = "\b\n" + "\n".join([f"Example{'s' * (len(examples) > 1)}:", *(f"  {each}" for each in examples)])
        group.command(name or body.__name__, cls=PanelCommand, epilog=epilog)(callback)
        return body

    return register

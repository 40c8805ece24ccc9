"""The application that commands register with, and the options that all of them take."""

from __future__ import annotations

import inspect as introspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer

from dqtool import report
from dqtool.errors import UsageError
from dqtool.stages.common import Common, check_values

__all__ = ["COMMON", "app", "command"]

EPILOG = """\b
One model, five stages:
  dqtool zoo get digits-ddpm -o model
  dqtool dilate model | dqtool calibrate | dqtool distill --bits 4/4 | dqtool export | dqtool eval

Standard output carries the path of what was written, everything else goes to standard error. Exit codes: 0 done or
cached, 2 usage, 3 bad artifact, 4 environment, 5 numbers (NaN, divergence), 130 interrupted."""

app = typer.Typer(
    name="dqtool",
    help="Quantize diffusion models to 4-8 bits: smaller files, faster steps, images that hold up (DilateQuant).",
    epilog=EPILOG,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from dqtool import __version__

        print(f"dqtool {__version__}")
        raise typer.Exit


def common_options(
    force: Annotated[bool, typer.Option("--force", help="Do the work again, whatever is cached.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, messages or tables; warnings remain.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the path.")] = False,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that dqtool did not write; inputs are never replaced.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and library warnings.")] = False,
) -> Common:
    """The options that every command takes."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"'{device}' is no device", where="--device", fix="Choose auto, cpu, cuda or cuda:N")
    report.set_quiet(quiet)
    return Common(force=force, quiet=quiet, json=json, device=device, dry_run=dry_run, overwrite=overwrite)


COMMON = introspect.signature(common_options, eval_str=True).parameters


def command(*examples: str, group: typer.Typer = app, name: str | None = None) -> Callable[[Callable], Callable]:
    """Register a function (its options, `common`) as a command that takes the common options too."""

    def register(body: Callable[..., None]) -> Callable[..., None]:
        own = introspect.signature(body, eval_str=True).parameters

        def callback(**values: Any) -> None:
            common = common_options(**{key: values.pop(key) for key in COMMON})
            check_values(values)
            body(**values, common=common)

        parameters = [p for p in own.values() if p.name != "common"] + list(COMMON.values())
        keyword_only = [p.replace(kind=introspect.Parameter.KEYWORD_ONLY) for p in parameters]
        callback.__signature__ = introspect.Signature(keyword_only)  # type: ignore[attr-defined]
        callback.__annotations__ = {p.name: p.annotation for p in parameters}
        callback.__doc__, callback.__name__ = body.__doc__, body.__name__
        epilog = "\b\n" + "\n".join([f"Example{'s' * (len(examples) > 1)}:", *(f"  {each}" for each in examples)])
        group.command(name or body.__name__, epilog=epilog)(callback)
        return body

    return register

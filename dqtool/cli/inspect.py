"""`dqtool inspect`: what a file is."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.output import print_report
from dqtool.stages.common import Common


@command("dqtool inspect distilled.safetensors", "dqtool inspect zoo:digits-ddpm --json")
def inspect(
    anything: Annotated[
        str, typer.Argument(metavar="ANY", help="An artifact, an exported directory, a model or zoo:NAME.")
    ],
    common: Common,
) -> None:
    """Say what an artifact or a model is.

    Stage, inputs, parameters, size, layers with their bits, metrics.
    """
    from dqtool.stages.inspect import describe, render

    description = describe(anything)
    print_report(description, render(description), common)

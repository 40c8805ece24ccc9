"""`dqtool inspect`: a description of any file."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.output import print_report
from dqtool.stages.shared.settings import RunSettings


@command("dqtool inspect distilled.safetensors", "dqtool inspect zoo:digits-ddpm --json")
def inspect(
    anything: Annotated[
        str, typer.Argument(metavar="ANY", help="Artifact, exported directory, model or zoo:NAME to describe.")
    ],
    settings: RunSettings,
) -> None:
    """Describe an artifact or a model.

    Prints its stage, inputs, parameters, size, metrics, and the layers with their bits.
    """
    from dqtool.stages.inspect import describe, render

    description = describe(anything)
    print_report(description, render(description), settings)

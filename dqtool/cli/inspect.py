"""`dqtool inspect`: a description of any file."""

from __future__ import annotations

from dqtool.cli.app import command
from dqtool.cli.output import print_report
from dqtool.stages.options.inspect import InspectOptions
from dqtool.stages.shared.settings import RunSettings


@command(InspectOptions, "dqtool inspect distilled.safetensors", "dqtool inspect zoo:digits-ddpm --json")
def inspect(options: InspectOptions, settings: RunSettings) -> None:
    """Describe an artifact or a model.

    Prints its stage, inputs, parameters, size, metrics, and the layers with their bits.
    """
    from dqtool.stages.inspect import describe, render

    description = describe(options.anything)
    print_report(description.to_json(), render(description), settings)

"""`dqtool sample`: images."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import Conditions, CorrectNoise, Guidance, PipelineDirectory, Prompts, RandomConditions
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command("dqtool sample exported -n 16 -o samples.png")
def sample(
    directory: Annotated[str, typer.Argument(help="An exported directory.")],
    common: Common,
    number: Annotated[int, typer.Option("--number", "-n", metavar="N", help="Images to sample.")] = 16,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.png", help="Where to write.")] = "samples.png",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the images.")] = 0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Sampling steps; left out: as calibrated.")] = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    conditions: Conditions = None,
    pipeline: PipelineDirectory = None,
    random_conditions: RandomConditions = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images sampled together.")] = 64,
    runtime: Annotated[str, typer.Option(metavar="NAME", help="What runs the network.")] = "simulate",
    correct_noise: CorrectNoise = False,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For it: the full-precision model; left out: where it was.")
    ] = None,
) -> None:
    """Draw images from an exported directory."""
    run_stage("sample", **locals())

"""`dqtool calibrate`: sample the full-precision model."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import Artifact, Conditions, Guidance, Output, PipelineDirectory, Prompts, RandomConditions
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command(
    "dqtool calibrate dilated.safetensors --steps 20 --samples 5120",
    "dqtool calibrate dilated.safetensors --steps 100 --scaling keep",
)
def calibrate(
    common: Common,
    artifact: Artifact = None,
    output: Output = "calibrated.safetensors",
    steps: Annotated[int, typer.Option(metavar="N", help="Sampling steps the quantized model will take.")] = 20,
    sampler: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ddim, ddpm, plms, dpmsolver, euler, euler_ancestral or lcm; left out: the pipeline's own.",
        ),
    ] = None,
    spacing: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Timesteps: leading, trailing, linspace or quad; left out: as the pipeline spaces them.",
        ),
    ] = None,
    timesteps: Annotated[
        str | None, typer.Option(metavar="T,T,...", help="Exactly these timesteps, from the most noise on.")
    ] = None,
    clip: Annotated[
        bool | None,
        typer.Option("--clip/--no-clip", help="Clip predicted images to [-1, 1]; left out: as the pipeline does."),
    ] = None,
    variance: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Of ddpm: fixed_small, fixed_large, or learned_range (DiT's own protocol)."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Pairs (x_t, t) to keep for training.")] = 5120,
    draw: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of which steps: stratified (all alike), uniform, normal or density."),
    ] = "stratified",
    scaling: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How activations change dilate's factors: auto keeps or replaces each layer's by output error, and distill "
            "learns on; keep leaves them; or none, smoothquant, osplus, omniquant, awq, dgq.",
        ),
    ] = "auto",
    bits: Annotated[
        str, typer.Option(metavar="W/A", help="The bits at which auto and osplus compare outputs.")
    ] = "4/4",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the images that are sampled.")] = 0,
    eta: Annotated[float, typer.Option(metavar="F", help="Noise added at each step of ddim.")] = 0.0,
    guidance: Guidance = None,
    prompts: Prompts = None,
    conditions: Conditions = None,
    pipeline: PipelineDirectory = None,
    random_conditions: RandomConditions = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images sampled together.")] = 64,
) -> None:
    """Sample the full-precision model, choose factors by activations, keep statistics.

    One calibration, with its trajectory, serves every bit width.
    """
    run_stage("calibrate", **locals())

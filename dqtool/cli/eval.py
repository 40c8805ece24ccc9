"""`dqtool eval`: figures of merit."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import (
    Conditions,
    CorrectNoise,
    Guidance,
    ImageSize,
    InceptionWeights,
    Output,
    PipelineDirectory,
    Prompts,
    RandomConditions,
)
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command(
    "dqtool eval exported --samples 4096 --grid samples.png",
    "dqtool eval exported --samples 50000 --inception-weights pt_inception-2015-12-05.pth --ref-stats imagenet.npz",
    name="eval",
)
def evaluate(
    common: Common,
    artifact: Annotated[
        str | None,
        typer.Argument(
            metavar="[ARTIFACT_OR_DIR]", help="Any artifact or exported directory; left out: from a pipe, or exported/."
        ),
    ] = None,
    output: Output = "eval.json",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The full-precision model (left out: where it was), or an exported directory in the simulate runtime.",
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="A,B,...", help="Which figures; left out: all that the model and the files allow."),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Images to sample.")] = 1024,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the images, the same for both models.")] = 0,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Sampling steps; left out: as calibrated.")] = None,
    sampler: Annotated[str | None, typer.Option(metavar="NAME", help="Left out: as calibrated.")] = None,
    guidance: Guidance = None,
    prompts: Prompts = None,
    conditions: Conditions = None,
    pipeline: PipelineDirectory = None,
    random_conditions: RandomConditions = False,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Images sampled together.")] = 128,
    runtime: Annotated[str, typer.Option(metavar="NAME", help="What runs an exported directory.")] = "simulate",
    grid: Annotated[str | None, typer.Option(metavar="FILE.png", help="A picture of samples, both models.")] = None,
    inception_weights: InceptionWeights = None,
    ref_stats: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.npz", help="For fid, sfid, pr: from `dqtool stats`, or of the ADM evaluation suite."
        ),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(metavar="DIR", help="For clip and aesthetic: a CLIPModel with its tokenizer.")
    ] = None,
    aesthetic_weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="For aesthetic: LAION's head over CLIP embeddings.")
    ] = None,
    image_size: ImageSize = None,
    save_samples: Annotated[
        str | None, typer.Option(metavar="FILE.npz", help="Keep the samples as a batch of the ADM evaluation suite.")
    ] = None,
    correct_noise: CorrectNoise = False,
) -> None:
    """Measure against the full-precision reference.

    Takes any artifact or exported directory; samples both models with the same seeds.
    """
    run_stage("eval", **locals())

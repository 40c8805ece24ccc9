"""`dqtool dilate`: dilate the weights."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import Output
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command("dqtool dilate model.safetensors -o dilated.safetensors", "dqtool dilate zoo:digits-ddpm")
def dilate(
    model: Annotated[
        str,
        typer.Argument(
            help="A .safetensors file with config.json beside it, a diffusers directory, an original checkpoint, "
            "a Hub id, or zoo:NAME."
        ),
    ],
    common: Common,
    output: Output = "dilated.safetensors",
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="Its config.json or a directory with it, or the authors' YAML.")
    ] = None,
    prediction_type: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="What the network predicts, where its files don't say: epsilon, v_prediction, sample, flow_prediction.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A scheduler_config.json, or a directory with one: its noise schedule."),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which weights of several: fp16, bf16, ema, non_ema.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="The tokenizer of a single file that holds its text encoders."),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="A pipeline of the same kind, with all that the model comes without."),
    ] = None,
    scaling: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="wd is Weight Dilation; none leaves the weights as they are. Scaling by activations: calibrate --scaling.",
        ),
    ] = "wd",
    cap: Annotated[float, typer.Option(metavar="F", help="The largest factor of a channel.")] = 64.0,
    threshold: Annotated[
        float, typer.Option(metavar="F", help="Of wd: leave channels alone whose factor would be smaller.")
    ] = 1.0,
    family: Annotated[
        str | None, typer.Option(metavar="NAME", help="generic: take a network of a class that has no adapter.")
    ] = None,
    example: Annotated[
        str | None, typer.Option(metavar="FILE", help="For generic: a tensor for each further argument, safetensors.")
    ] = None,
    time_scale: Annotated[
        float | None,
        typer.Option(
            metavar="F",
            help="For generic: the network receives F * t for the scheduler's timestep t, or 1 + F * t where F is negative.",
        ),
    ] = None,
    components: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which network of a pipeline, one at a time; left out: its denoiser."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA to add first; may be repeated.")
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Divide in what makes the input (norms, v, adaLN) where the algebra allows.")
    ] = False,
    stats: Annotated[str | None, typer.Option(hidden=True, help="Moved: see calibrate --scaling.")] = None,
    bits: Annotated[str | None, typer.Option(hidden=True, help="Moved: see calibrate --bits.")] = None,
) -> None:
    """Multiply in-channels of weights by Weight Dilation's factors; quantizers divide the inputs by the same factors.

    Reads weights only. The output computes what the model computes, and its weights keep their ranges.
    """
    run_stage("dilate", **locals())

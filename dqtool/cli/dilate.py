"""`dqtool dilate`: widen in-channels."""

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
            help="How channels are scaled: auto chooses for every layer (in calibrate, unless --stats is given) and learns "
            "on in distill; wd is Weight Dilation, exactly.",
        ),
    ] = "auto",
    stats: Annotated[
        str | None, typer.Option(metavar="CALIBRATED", help="Activation statistics, for methods that look at them.")
    ] = None,
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
    components: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which network of a pipeline, one at a time; left out: its denoiser."),
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:WEIGHT]", help="A LoRA to add first; may be repeated.")
    ] = None,
    bits: Annotated[
        str, typer.Option(metavar="W/A", help="The bits that osplus and auto, which compare outputs, choose for.")
    ] = "4/4",
    fold: Annotated[
        bool, typer.Option("--fold", help="Divide in what makes the input (norms, v, adaLN) where the algebra allows.")
    ] = False,
) -> None:
    """Widen in-channels of weights, and divide the inputs they read by the same factors.

    Weight Dilation (wd) reads weights only. By default factors balance weights and activations, which calibrate sees.
    """
    run_stage("dilate", **locals())

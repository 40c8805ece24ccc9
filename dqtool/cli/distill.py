"""`dqtool distill`: train and pack."""

from __future__ import annotations

from typing import Annotated

import typer

from dqtool.cli.app import command
from dqtool.cli.options import Artifact, Output
from dqtool.cli.output import run_stage
from dqtool.stages.common import Common


@command(
    "dqtool distill calibrated.safetensors --bits 4/4",
    "dqtool distill calibrated.safetensors --bits 4/4 --keep 'mid_block.*=8/8' -o w4a4.safetensors",
)
def distill(
    common: Common,
    artifact: Artifact = None,
    output: Output = "distilled.safetensors",
    bits: Annotated[str, typer.Option(metavar="W/A", help="Weights/activations, 2 to 8 or 16 for float.")] = "4/4",
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="To check: the steps the input was calibrated for.")
    ] = None,
    iters: Annotated[
        int | None,
        typer.Option(metavar="N", help="Iterations per block, or of the network where a method trains it whole."),
    ] = None,
    refine_iters: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="For bkd: iterations of the pass over all blocks; left out: 0 for samplers that extrapolate (PLMS, LMS).",
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="How weights are learned: bkd, bkd-blockwise, on-policy, ptq, adaround, lsq, lora-qat, qat-partial or per-step.",
        ),
    ] = "bkd",
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the training.")] = 0,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="REGEX=W/A", help="Other bits for some layers; may be repeated.")
    ] = None,
    softmax_bits: Annotated[int, typer.Option(metavar="N", help="Bits of the attention's softmax output.")] = 8,
    static: Annotated[bool, typer.Option("--static", help="One activation range for all steps.")] = False,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Samples per iteration; left out: 32.", show_default=False)
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Train these blocks only; the others stay as initialised.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="standard: every layer; nonstandard: upsampled and skip convolutions and attention products stay float.",
        ),
    ] = "standard",
    train_samples: Annotated[
        int | None, typer.Option(metavar="N", help="Points of the trajectory to train on; left out: all.")
    ] = None,
    cache_memory: Annotated[
        int, typer.Option(metavar="MIB", help="Cached activations beyond this go to disk (TMPDIR).")
    ] = 6144,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="All cached activations to disk, few samples at once: the same up to rounding, slower.",
        ),
    ] = False,
    correct_noise: Annotated[
        bool | None,
        typer.Option(
            "--correct-noise/--no-correct-noise",
            help="Take the errors of slope, detail and mean out of every step's predictions, with tables fitted after training; "
            "left out: where bkd, bkd-blockwise or on-policy trained something, but for samplers that extrapolate (PLMS, LMS).",
            show_default=False,
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="End with an error where training diverges, in place of leaving that block as calibrated."
        ),
    ] = False,
) -> None:
    """Choose the bits, train block by block, and pack.

    The quantizers are set from the calibration, then trained with the weights against the full-precision model.
    """
    run_stage("distill", **locals())

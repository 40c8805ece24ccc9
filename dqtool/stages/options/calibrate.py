"""Options of `dqtool calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from dqtool.core.bits import LayerBits, parse_bits
from dqtool.errors import UsageError
from dqtool.stages.options.declared import INPUT, RESOURCES, Option
from dqtool.stages.options.shared import (
    ARTIFACT,
    BATCH_HELP,
    CONDITIONS,
    GUIDANCE,
    IMAGES,
    LARGEST_SEED,
    OUTPUT,
    PIPELINE,
    PROMPTS,
    RANDOM_CONDITIONS,
)

if TYPE_CHECKING:
    from dqtool.models.sampling.schedulers import SchedulerChoices

__all__ = ["CalibrateOptions", "schedule_of", "with_steps"]

STRATIFIED = "stratified"

STEPS = 20
"""Default number of sampling steps."""
STEPS_OF = {"CMStochasticIterativeScheduler": 1, "LCMScheduler": 4, "FlowMatchLCMScheduler": 4, "TCDScheduler": 4}
"""Default for the schedulers of networks that were trained for few steps, by class name."""

KEEP, AUTO = "keep", "auto"
WITHOUT_IMPORTS = (KEEP, AUTO, "none")
"""Values of `--scaling` that are accepted without importing torch."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `dqtool calibrate`. `samples` counts (x_t, t) pairs; `draw` divides them among the steps."""

    artifact: Annotated[str | None, ARTIFACT] = None
    output: Annotated[str, OUTPUT] = "calibrated.safetensors"
    steps: Annotated[
        int | None,
        Option(
            "Sampling steps of the quantized model. Give the number you will sample with. Default: 20; 1 for consistency "
            "models and 4 for latent consistency models.",
            "N",
            least=1,
            show_default=False,
        ),
    ] = None
    sampler: Annotated[
        str | None,
        Option(
            "Sampler of the quantized model: {dqtool.models.sampling.schedulers:SAMPLERS}. Give the one you will sample with. "
            "Default: the pipeline's own.",
            "NAME",
        ),
    ] = None
    spacing: Annotated[
        str | None,
        Option(
            "Spacing of the timesteps: {dqtool.models.sampling.schedulers:SPACINGS}. Give the one you will sample with. "
            "Default: the pipeline's own.",
            "NAME",
        ),
    ] = None
    timesteps: Annotated[
        str | None,
        Option(
            "Timesteps to sample at, from the noisiest on, such as 999,749,499,249. Give them in place of a spacing, for a model "
            "that was trained at certain timesteps.",
            "T,T,...",
        ),
    ] = None
    clip: Annotated[
        bool | None,
        Option("Clip predicted images to [-1, 1], or leave them as predicted. Default: the pipeline's own setting."),
    ] = None
    variance: Annotated[
        str | None,
        Option(
            "Variance of the ddpm sampler: {dqtool.models.sampling.schedulers:VARIANCES}. DiT was published with learned_range.",
            "NAME",
        ),
    ] = None
    samples: Annotated[
        int,
        Option(
            "Samples (x_t, t) to keep for training. More train better, and take longer and more disk.", "N", least=1
        ),
    ] = 5120
    draw: Annotated[
        str,
        Option(
            "Distribution of the samples over the steps: stratified (equally many of each), uniform (Q-Diffusion), normal "
            "(PTQ4DM) or density (EDA-DM). Change it to compare with these methods.",
            "NAME",
        ),
    ] = STRATIFIED
    scaling: Annotated[
        str,
        Option(
            "Scaling of the layers by their activations. auto replaces dilate's factors in each layer where others give less "
            "output error, and distill trains them further. keep leaves dilate's factors, as in the paper. none, smoothquant, "
            "awq, dgq, osplus and omniquant replace them in all layers. rotation rotates the inputs in groups of channels "
            "instead, where that gives less error.",
            "NAME",
        ),
    ] = AUTO
    bits: Annotated[
        str,
        Option(
            "Bits at which auto and osplus compare outputs. Give those you will distill with, if they differ much.",
            "W/A",
        ),
    ] = "4/4"
    seed: Annotated[
        int,
        Option("Seed of the sampled images. Change it to see how much results vary.", "N", least=0, most=LARGEST_SEED),
    ] = 0
    eta: Annotated[
        float, Option("Noise that the ddim sampler adds at each step: 0 for none, 1 for as much as ddpm.", "F", least=0)
    ] = 0.0
    guidance: Annotated[float | None, GUIDANCE] = None
    image_guidance: Annotated[
        float | None,
        Option(
            "Weight of guidance towards the image, for networks that edit images; higher changes it less. 0 leaves it out. "
            "Default: 1.5 for such networks.",
            "F",
            least=0,
        ),
    ] = None
    prompts: Annotated[str | None, PROMPTS] = None
    conditions: Annotated[str | None, CONDITIONS] = None
    pipeline: Annotated[str | None, PIPELINE] = None
    images: Annotated[str | None, IMAGES] = None
    random_conditions: Annotated[bool, RANDOM_CONDITIONS] = False
    statistics: Annotated[
        str | None,
        Option(
            "Calibrated artifact of a model of the same architecture, schedule and prediction type. Its samples, statistics and "
            "factors are taken over, without sampling. Give it for a finetune of that model.",
            "FILE",
            panel=INPUT,
        ),
    ] = None
    batch_size: Annotated[int, Option(BATCH_HELP, "N", least=1, panel=RESOURCES)] = 64

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown draw, scaling, sampler, spacing or variance, and for bits or timesteps that
        can't be read.
        """
        from dqtool.models.sampling.schedulers import check_sampler

        _ = self.layer_bits
        check_sampler(self.sampler)
        schedule_of(self)
        if self.scaling not in WITHOUT_IMPORTS:
            from dqtool.scaling.methods import check_activation_method

            check_activation_method(self.scaling)
        if self.draw != STRATIFIED:  # the default needs no check, which would import torch
            from dqtool.core.draws import draw_method

            draw_method(self.draw)

    @cached_property
    def layer_bits(self) -> LayerBits:
        """Parsed `bits`."""
        return parse_bits(self.bits)


def with_steps(options: CalibrateOptions, scheduler: Mapping[str, Any] | None) -> CalibrateOptions:
    """Return the options with the number of steps filled in; `scheduler` is the config of the pipeline's own."""
    from dqtool.models.sampling.schedulers import scheduler_class

    if options.timesteps is not None:
        return replace(options, steps=len(schedule_of(options).timesteps or ()))
    if options.steps is not None:
        return options
    return replace(options, steps=STEPS_OF.get(scheduler_class(scheduler, options.sampler), STEPS))


def schedule_of(options: CalibrateOptions) -> SchedulerChoices:
    """Return the choices about the scheduler: its timesteps, clipping and variance.

    Raises:
        UsageError: an unknown spacing or variance, or timesteps that are not a list of numbers.
    """
    from dqtool.models.sampling.schedulers import SchedulerChoices

    listed = None
    if options.timesteps is not None:
        try:
            listed = tuple(float(part) for part in options.timesteps.split(","))
        except ValueError as e:
            raise UsageError(
                f"'{options.timesteps}' is not a list of timesteps", where="--timesteps", fix="Example: 999,749,499,249"
            ) from e
    return SchedulerChoices(options.spacing, listed, options.clip, options.variance)

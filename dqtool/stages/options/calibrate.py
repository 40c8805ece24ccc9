"""Options of `dqtool calibrate`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Annotated

from dqtool.core.bits import LayerBits, parse_bits
from dqtool.errors import UsageError
from dqtool.stages.options.declared import Option
from dqtool.stages.options.shared import (
    ARTIFACT,
    CONDITIONS,
    GUIDANCE,
    LARGEST_SEED,
    OUTPUT,
    PIPELINE,
    PROMPTS,
    RANDOM_CONDITIONS,
)

if TYPE_CHECKING:
    from dqtool.models.schedulers import SchedulerChoices

__all__ = ["CalibrateOptions", "schedule_of"]

STRATIFIED = "stratified"

KEEP, AUTO = "keep", "auto"
WITHOUT_IMPORTS = (KEEP, AUTO, "none")
"""Values of `--scaling` that are accepted without importing torch."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `dqtool calibrate`. `samples` counts (x_t, t) pairs, `draw` says how many of them are of which step."""

    artifact: Annotated[str | None, ARTIFACT] = None
    output: Annotated[str, OUTPUT] = "calibrated.safetensors"
    steps: Annotated[int, Option("Sampling steps the quantized model will take.", "N", least=1)] = 20
    sampler: Annotated[
        str | None,
        Option("ddim, ddpm, plms, dpmsolver, euler, euler_ancestral or lcm; left out: the pipeline's own.", "NAME"),
    ] = None
    spacing: Annotated[
        str | None,
        Option("Timesteps: leading, trailing, linspace or quad; left out: as the pipeline spaces them.", "NAME"),
    ] = None
    timesteps: Annotated[str | None, Option("Exactly these timesteps, from the most noise on.", "T,T,...")] = None
    clip: Annotated[bool | None, Option("Clip predicted images to [-1, 1]; left out: as the pipeline does.")] = None
    variance: Annotated[
        str | None, Option("Of ddpm: fixed_small, fixed_large, or learned_range (DiT's own protocol).", "NAME")
    ] = None
    samples: Annotated[int, Option("Pairs (x_t, t) to keep for training.", "N", least=1)] = 5120
    draw: Annotated[str, Option("Of which steps: stratified (all alike), uniform, normal or density.", "NAME")] = (
        STRATIFIED
    )
    scaling: Annotated[
        str,
        Option(
            "How activations change dilate's factors: auto keeps or replaces each layer's by output error, "
            "and distill learns on; keep leaves them; or none, smoothquant, osplus, omniquant, awq, dgq.",
            "NAME",
        ),
    ] = AUTO
    bits: Annotated[str, Option("The bits at which auto and osplus compare outputs.", "W/A")] = "4/4"
    seed: Annotated[int, Option("Seed of the images that are sampled.", "N", least=0, most=LARGEST_SEED)] = 0
    eta: Annotated[float, Option("Noise added at each step of ddim.", "F", least=0)] = 0.0
    guidance: Annotated[float | None, GUIDANCE] = None
    prompts: Annotated[str | None, PROMPTS] = None
    conditions: Annotated[str | None, CONDITIONS] = None
    pipeline: Annotated[str | None, PIPELINE] = None
    random_conditions: Annotated[bool, RANDOM_CONDITIONS] = False
    batch_size: Annotated[int, Option("Images sampled together.", "N", least=1)] = 64

    def __post_init__(self) -> None:
        """Raise `UsageError` for a draw, scaling, bits, spacing or variance that does not exist, or a list that is none."""
        _ = self.layer_bits
        schedule_of(self)
        if self.scaling not in WITHOUT_IMPORTS:
            from dqtool.scaling.methods import check_activation_method

            check_activation_method(self.scaling)
        if self.draw != STRATIFIED:  # the usual one is there without torch
            from dqtool.core.draws import draw_method

            draw_method(self.draw)

    @cached_property
    def layer_bits(self) -> LayerBits:
        """`bits`, parsed."""
        return parse_bits(self.bits)


def schedule_of(options: CalibrateOptions) -> SchedulerChoices:
    """Return what the options say of the scheduler's timesteps, clipping and variance.

    Raises:
        UsageError: a spacing or variance that does not exist, or a list that is none.
    """
    from dqtool.models.schedulers import SchedulerChoices

    listed = None
    if options.timesteps is not None:
        try:
            listed = tuple(float(part) for part in options.timesteps.split(","))
        except ValueError as e:
            raise UsageError(
                f"'{options.timesteps}' is no list of timesteps", where="--timesteps", fix="Example: 999,749,499,249"
            ) from e
    return SchedulerChoices(options.spacing, listed, options.clip, options.variance)

"""Options of `dqtool sample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.models.sampling.fitted import AUTO, check_correction
from dqtool.stages.options.declared import INPUT, RESOURCES, Option
from dqtool.stages.options.shared import (
    BATCH_HELP,
    CONDITIONS,
    CORRECT_NOISE,
    CORRECTION,
    GUIDANCE,
    IMAGES,
    LARGEST_SEED,
    PIPELINE,
    PROMPTS,
    RANDOM_CONDITIONS,
)

__all__ = ["SampleOptions"]


@dataclass(frozen=True)
class SampleOptions:
    """Options of `dqtool sample`."""

    directory: Annotated[str, Option("Exported directory to sample from.", positional=True)]
    number: Annotated[int, Option("Images to sample.", "N", least=1, short="-n", panel=INPUT)] = 16
    output: Annotated[str, Option("Picture to write.", "FILE.png", short="-o", panel=INPUT)] = "samples.png"
    seed: Annotated[int, Option("Seed of the images.", "N", least=0, most=LARGEST_SEED)] = 0
    steps: Annotated[int | None, Option("Sampling steps. Default: those of the calibration.", "N", least=1)] = None
    guidance: Annotated[float | None, GUIDANCE] = None
    prompts: Annotated[str | None, PROMPTS] = None
    conditions: Annotated[str | None, CONDITIONS] = None
    pipeline: Annotated[str | None, PIPELINE] = None
    images: Annotated[str | None, IMAGES] = None
    random_conditions: Annotated[bool, RANDOM_CONDITIONS] = False
    batch_size: Annotated[int, Option(BATCH_HELP, "N", least=1, panel=RESOURCES)] = 64
    runtime: Annotated[
        str,
        Option(
            "Engine that runs the network: {dqtool.runtimes:RUNTIMES}, or auto for the fastest here. "
            "Give simulate for figures that are compared with those of other machines.",
            "NAME",
            panel=RESOURCES,
        ),
    ] = "auto"
    correct_noise: Annotated[bool, CORRECT_NOISE] = False
    correction: Annotated[str, CORRECTION] = AUTO
    reference: Annotated[
        str | None,
        Option(
            "Full-precision model for --correct-noise. Default: the model that was quantized, at its original path.",
            "MODEL",
            panel=INPUT,
        ),
    ] = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown value of `--correction`."""
        check_correction(self.correction)

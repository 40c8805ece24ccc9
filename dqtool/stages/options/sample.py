"""Options of `dqtool sample`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.stages.options.declared import Option
from dqtool.stages.options.shared import (
    CONDITIONS,
    CORRECT_NOISE,
    GUIDANCE,
    LARGEST_SEED,
    PIPELINE,
    PROMPTS,
    RANDOM_CONDITIONS,
)

__all__ = ["SampleOptions"]


@dataclass(frozen=True)
class SampleOptions:
    """Options of `dqtool sample`."""

    directory: Annotated[str, Option("An exported directory.", positional=True)]
    number: Annotated[int, Option("Images to sample.", "N", least=1, short="-n")] = 16
    output: Annotated[str, Option("Where to write.", "FILE.png", short="-o")] = "samples.png"
    seed: Annotated[int, Option("Seed of the images.", "N", least=0, most=LARGEST_SEED)] = 0
    steps: Annotated[int | None, Option("Sampling steps; left out: as calibrated.", "N", least=1)] = None
    guidance: Annotated[float | None, GUIDANCE] = None
    prompts: Annotated[str | None, PROMPTS] = None
    conditions: Annotated[str | None, CONDITIONS] = None
    pipeline: Annotated[str | None, PIPELINE] = None
    random_conditions: Annotated[bool, RANDOM_CONDITIONS] = False
    batch_size: Annotated[int, Option("Images sampled together.", "N", least=1)] = 64
    runtime: Annotated[str, Option("What runs the network.", "NAME")] = "simulate"
    correct_noise: Annotated[bool, CORRECT_NOISE] = False
    reference: Annotated[str | None, Option("For it: the full-precision model; left out: where it was.", "MODEL")] = (
        None
    )

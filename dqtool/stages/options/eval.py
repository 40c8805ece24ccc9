"""Options of `dqtool eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.errors import UsageError
from dqtool.stages.options.declared import Option
from dqtool.stages.options.shared import (
    CONDITIONS,
    CORRECT_NOISE,
    GUIDANCE,
    IMAGE_SIZE,
    INCEPTION_WEIGHTS,
    LARGEST_SEED,
    OUTPUT,
    PIPELINE,
    PROMPTS,
    RANDOM_CONDITIONS,
)

__all__ = ["DEFAULT_METRICS", "NETWORK_METRICS", "EvalOptions"]

NETWORK_METRICS = ("layers", "cost")
"""Metrics of the network in place of its images: error per layer; size and bit operations."""
DEFAULT_METRICS = ("digits", "similarity", *NETWORK_METRICS)
"""Metrics that need no file. The others join when the files they need are given."""


@dataclass(frozen=True)
class EvalOptions:
    """Options of `dqtool eval`. `samples` counts images; `reference` defaults to the model the artifact was made from;
    an exported directory stands for its samples in the `simulate` runtime."""

    artifact: Annotated[
        str | None,
        Option(
            "Any artifact or exported directory; left out: from a pipe, or exported/.",
            "[ARTIFACT_OR_DIR]",
            positional=True,
        ),
    ] = None
    output: Annotated[str, OUTPUT] = "eval.json"
    reference: Annotated[
        str | None,
        Option(
            "The full-precision model (left out: where it was), or an exported directory in the simulate runtime.",
            "MODEL",
        ),
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        Option("Which figures; left out: all that the model and the files allow.", "A,B,...", separated=True),
    ] = None
    samples: Annotated[int, Option("Images to sample.", "N", least=1)] = 1024
    seed: Annotated[int, Option("Seed of the images, the same for both models.", "N", least=0, most=LARGEST_SEED)] = 0
    steps: Annotated[int | None, Option("Sampling steps; left out: as calibrated.", "N", least=1)] = None
    sampler: Annotated[str | None, Option("Left out: as calibrated.", "NAME")] = None
    guidance: Annotated[float | None, GUIDANCE] = None
    prompts: Annotated[str | None, PROMPTS] = None
    conditions: Annotated[str | None, CONDITIONS] = None
    pipeline: Annotated[str | None, PIPELINE] = None
    random_conditions: Annotated[bool, RANDOM_CONDITIONS] = False
    batch_size: Annotated[int, Option("Images sampled together.", "N", least=1)] = 128
    runtime: Annotated[str, Option("What runs an exported directory.", "NAME")] = "simulate"
    grid: Annotated[str | None, Option("A picture of samples, both models.", "FILE.png")] = None
    inception_weights: Annotated[str | None, INCEPTION_WEIGHTS] = None
    ref_stats: Annotated[
        str | None, Option("For fid, sfid, pr: from `dqtool stats`, or of the ADM evaluation suite.", "FILE.npz")
    ] = None
    clip: Annotated[str | None, Option("For clip and aesthetic: a CLIPModel with its tokenizer.", "DIR")] = None
    aesthetic_weights: Annotated[str | None, Option("For aesthetic: LAION's head over CLIP embeddings.", "FILE")] = None
    image_size: Annotated[int | None, IMAGE_SIZE] = None
    save_samples: Annotated[
        str | None, Option("Keep the samples as a batch of the ADM evaluation suite.", "FILE.npz")
    ] = None
    correct_noise: Annotated[bool, CORRECT_NOISE] = False

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown metric."""
        if self.metrics is None:
            return
        from dqtool.metrics import METRICS

        for metric in self.metrics:
            if metric not in METRICS and metric not in NETWORK_METRICS:
                known = ", ".join(dict.fromkeys((*DEFAULT_METRICS, *METRICS)))
                raise UsageError(f"unknown metric '{metric}'", where="--metrics", fix=f"Choose from {known}")

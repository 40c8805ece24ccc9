"""Options of `dqtool eval`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dqtool.errors import UsageError
from dqtool.models.sampling.fitted import AUTO, check_correction
from dqtool.stages.options.declared import INPUT, RESOURCES, Option
from dqtool.stages.options.shared import (
    BATCH_HELP,
    CONDITIONS,
    CORRECT_NOISE,
    CORRECTION,
    GUIDANCE,
    IMAGE_SIZE,
    IMAGES,
    INCEPTION_WEIGHTS,
    LARGEST_SEED,
    OUTPUT,
    PIPELINE,
    PROMPTS,
    RANDOM_CONDITIONS,
)

__all__ = ["DEFAULT_METRICS", "NETWORK_METRICS", "EvalOptions"]

NETWORK_METRICS = ("layers", "cost")
"""Metrics of the network rather than its images: error of each layer; size and bit operations."""
DEFAULT_METRICS = ("similarity", *NETWORK_METRICS)
"""Metrics that need no file. The others are computed when the files they need are given."""


@dataclass(frozen=True)
class EvalOptions:
    """Options of `dqtool eval`.

    `samples` counts images. `reference` None is the model that the artifact was made from. An exported directory as
    `reference` is sampled in the `simulate` runtime.
    """

    artifact: Annotated[
        str | None,
        Option(
            "Artifact or exported directory to measure. Default: the path that a pipe brings, else exported/.",
            "ARTIFACT_OR_DIR",
            positional=True,
        ),
    ] = None
    output: Annotated[str, OUTPUT] = "eval.json"
    reference: Annotated[
        str | None,
        Option(
            "Model to compare with: the full-precision model, or another exported directory. Default: the model that "
            "was quantized, at its original path.",
            "MODEL",
            panel=INPUT,
        ),
    ] = None
    metrics: Annotated[
        tuple[str, ...] | None,
        Option(
            "Metrics to compute: {dqtool.metrics.registry:METRICS}, {dqtool.stages.options.eval:NETWORK_METRICS}. Default: "
            "all that the model and the given files allow.",
            "A,B,...",
            separated=True,
        ),
    ] = None
    samples: Annotated[
        int, Option("Images to sample. Figures of published models need 50000 (COCO: 30000).", "N", least=1)
    ] = 1024
    seed: Annotated[int, Option("Seed of the images, the same for both models.", "N", least=0, most=LARGEST_SEED)] = 0
    steps: Annotated[int | None, Option("Sampling steps. Default: those of the calibration.", "N", least=1)] = None
    sampler: Annotated[
        str | None,
        Option("Sampler: {dqtool.models.sampling.schedulers:SAMPLERS}. Default: that of the calibration.", "NAME"),
    ] = None
    guidance: Annotated[float | None, GUIDANCE] = None
    prompts: Annotated[str | None, PROMPTS] = None
    conditions: Annotated[str | None, CONDITIONS] = None
    pipeline: Annotated[str | None, PIPELINE] = None
    images: Annotated[str | None, IMAGES] = None
    random_conditions: Annotated[bool, RANDOM_CONDITIONS] = False
    batch_size: Annotated[int, Option(BATCH_HELP, "N", least=1, panel=RESOURCES)] = 128
    runtime: Annotated[
        str,
        Option(
            "Engine that runs an exported directory: {dqtool.runtimes:RUNTIMES}, or auto for the fastest here. "
            "Give simulate for figures that are compared with those of other machines.",
            "NAME",
            panel=RESOURCES,
        ),
    ] = "auto"
    grid: Annotated[
        str | None, Option("Picture to write, with samples of both models side by side.", "FILE.png", panel=INPUT)
    ] = None
    inception_weights: Annotated[str | None, INCEPTION_WEIGHTS] = None
    ref_stats: Annotated[
        str | None,
        Option(
            "Statistics of the data set, from `dqtool stats` or the ADM evaluation suite. The metrics fid, sfid and pr need "
            "them.",
            "FILE.npz",
            panel=INPUT,
        ),
    ] = None
    clip: Annotated[
        str | None,
        Option(
            "Directory of a CLIPModel with its tokenizer. The metrics clip and aesthetic need it.",
            "DIR",
            panel=INPUT,
        ),
    ] = None
    aesthetic_weights: Annotated[
        str | None,
        Option(
            "File of LAION's aesthetic predictor, a head over CLIP embeddings. The metric aesthetic needs it.",
            "FILE",
            panel=INPUT,
        ),
    ] = None
    image_size: Annotated[int | None, IMAGE_SIZE] = None
    save_samples: Annotated[
        str | None,
        Option("File to keep the samples in, in the format of the ADM evaluation suite.", "FILE.npz", panel=INPUT),
    ] = None
    correct_noise: Annotated[bool, CORRECT_NOISE] = False
    correction: Annotated[str, CORRECTION] = AUTO
    floor: Annotated[
        bool,
        Option(
            "Also measure fd.digits or fd.garments between two sets of full-precision images of different noise: the distance that equal "
            "models have at this number of images. Give it to judge small distances."
        ),
    ] = False

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown metric, sampler or value of `--correction`."""
        from dqtool.models.sampling.schedulers import check_sampler

        check_sampler(self.sampler)
        check_correction(self.correction)
        if self.metrics is None:
            return
        from dqtool.metrics import METRICS

        for metric in self.metrics:
            if metric not in METRICS and metric not in NETWORK_METRICS:
                known = ", ".join(dict.fromkeys((*DEFAULT_METRICS, *METRICS)))
                raise UsageError(f"unknown metric '{metric}'", where="--metrics", fix=f"Choose from {known}")

"""`--correct-noise` of `eval` and `sample`: PTQD's statistics, from the full-precision model and the quantized one.

They are no part of an artifact: whoever asks for the correction has the full-precision model at hand, and statistics that
are taken when they are needed fit the sampler, the steps, the guidance and the runtime that are in use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dqtool.artifacts import Artifact
from dqtool.errors import EnvironmentFault, UsageError
from dqtool.stages.evaluation.reference import ExportedReference, Reference

if TYPE_CHECKING:
    from torch import nn

    from dqtool.models.sampling.noise_correction import NoiseCorrection
    from dqtool.stages.evaluation.images import ImageMaker

__all__ = ["FIT_IMAGES", "fit_correction", "needs_reference", "with_correction"]

FIT_IMAGES = 64
"""Images that the statistics are fitted on. They start from the noise of calibration, and no metric counts them."""


def needs_reference(reference: Reference | None, artifact: Artifact) -> None:
    """Raise `EnvironmentFault` if the reference is missing, `UsageError` if it is quantized itself."""
    if isinstance(reference, ExportedReference):
        raise UsageError(
            "Correcting the noise needs the full-precision model, and this one is quantized",
            where=f"--correct-noise, --reference {reference.given}",
            fix="Name the model that it was made from, or leave one of the two out",
        )
    if reference is None:
        raise EnvironmentFault(
            "Correcting the noise needs the full-precision model, and it is not there",
            where=f"--correct-noise, {artifact.manifest.network.source}",
            fix="Name it with --reference MODEL, or leave --correct-noise out",
        )


def fit_correction(
    network: nn.Module, exact: nn.Module, maker: ImageMaker, seed: int, batch_size: int, images: int = FIT_IMAGES
) -> NoiseCorrection:
    """Fit the correction of `network` for this maker's sampler. All `images` images are sampled side by side, `batch_size` at
    a time, and every step is fitted on all of them."""
    from dqtool import report
    from dqtool.models.sampling.noise_correction import NoiseCorrection
    from dqtool.models.sampling.noise_fit import NoiseFit
    from dqtool.models.sampling.sampler import CALIBRATION, image_seeds, initial_noise

    sampler, conditions = maker.sampler, maker.conditions
    if batch_size < images:
        sampler = replace(sampler, together=batch_size * sampler.inputs_per_image(conditions.guided))
    given = conditions.evenly(images).given(0, images)
    noise = initial_noise(maker.shape, range(images), seed, CALIBRATION)
    seeds = image_seeds(range(images), seed, CALIBRATION)
    with report.progress("noise correction", sampler.steps) as progress:
        fit = NoiseFit.while_sampling(sampler, network, exact, noise, seeds, given, conditions.null, progress.advance)
    return NoiseCorrection(fit.steps)


def with_correction(maker: ImageMaker, correction: NoiseCorrection) -> ImageMaker:
    """Return a maker that corrects every prediction."""
    return replace(maker, sampler=replace(maker.sampler, correction=correction))

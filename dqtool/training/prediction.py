"""Correction of the errors that remain in a trained network's predictions, fitted step by step while the network
samples.

The float network is evaluated at the points that the quantized network visits, and each step is corrected before the
next one is fitted. Training by squared error ends with predictions that are slightly too small, in their fine detail
most of all; more training on the same error does not change that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dqtool.artifacts.checkpoints import CallCheckpoints
from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.core.detail import detail
from dqtool.models.sampling.noise_correction import LEAST_FACTOR, StepNoise, fit_noise
from dqtool.models.sampling.noise_fit import NoiseFit
from dqtool.models.sampling.sampler import CALIBRATION, image_seeds, initial_noise
from dqtool.models.sampling.teacher_precision import precision_label
from dqtool.nn.prediction import attach_prediction, corrected, row_shapes, same_channels
from dqtool.nn.surgery import steps_of
from dqtool.training.data import DistillationTask, Reporter

__all__ = ["correct_predictions", "fit_step", "fit_tables"]

DAMPING = 0.1
"""Share of the error's power that is added to the products, see `fit_tables`."""

SEED_STRIDE, SEED_OFFSET = 7919, 2_000_000
"""Seeds of the images used for the fit; they differ from the seeds of calibration and of `on_policy`."""


@dataclass(frozen=True)
class StepCorrection(StepNoise):
    """Error found at one step, and the table rows `[C]` that correct it, by name."""

    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def corrected(self, prediction: Tensor, inputs: Tensor) -> Tensor:
        """Return the prediction that the network will make with these rows."""
        along = (1, -1, *[1] * (prediction.dim() - 2))
        return corrected(prediction, inputs, {name: row.to(prediction).view(along) for name, row in self.rows.items()})


def fit_step(quantized: Tensor, exact: Tensor, inputs: Tensor, of_images: bool) -> StepCorrection:
    """Return a step's error and its tables, see `fit_tables`. The sampler's own noise is not changed."""
    found = fit_noise(quantized, exact)
    rows = fit_tables(quantized, exact, inputs, of_images)
    return StepCorrection(found.slope, found.bias, 0.0, found.correlation, rows)


def fit_tables(quantized: Tensor, exact: Tensor, inputs: Tensor, of_images: bool) -> dict[str, Tensor]:
    """Return the rows, `[C]` each, that remove the predictable part of the error of `quantized`.

    The error is corrected as far as it correlates with `exact` and, for images, with the detail of `exact`, with
    `inputs` and with the detail of `inputs`. All channels share one factor; `bias` has one value for each channel.

    Let q be the terms of the quantized prediction and e those of the exact one (the terms of the inputs are equal). The
    factors w solve `<e, exact - quantized - w q> = 0`. This is an instrumental-variables estimate; least squares on q
    would make predictions smaller. With one term it equals PTQD's `1 / (1 + k)`. A tenth of the power of `q - e` is
    added to the products, which matters only where the noise exceeds the prediction.

    If some combination of the terms keeps less than `LEAST_FACTOR` of its power, the factors are unreliable. The
    prediction then gets a single factor, limited to that of `LEAST_FACTOR`.

    Args:
        quantized: predictions of the quantized network, `[N, C, ...]`.
        exact: predictions of the float network, of the same shape.
        inputs: the network's inputs, of the same shape.
        of_images: the samples have two spatial dimensions.
    """
    names = ("scale", "input", "detail", "input_detail") if of_images else ("scale",)
    inputs = same_channels(inputs, exact.shape[1]) if of_images else inputs

    def terms(prediction: Tensor) -> Tensor:
        found = [prediction, inputs, detail(prediction), detail(inputs)] if of_images else [prediction]
        return torch.stack([each.double().transpose(0, 1).flatten(1) for each in found])  # [K, C, n]

    def centred(of_channels: Tensor) -> Tensor:
        return (of_channels - of_channels.mean(-1, keepdim=True)).flatten(-2)

    ours, theirs = terms(quantized), terms(exact)
    q, e = centred(ours), centred(theirs)
    powers, products, noise = e @ e.T, e @ q.T, (q - e) @ (q - e).T
    missing = theirs[0] - ours[0]
    wanted = e @ centred(missing)
    if least_kept(powers, products) >= LEAST_FACTOR:
        factors = torch.linalg.pinv(products + DAMPING * noise) @ wanted
    else:
        factors = torch.zeros_like(wanted)
        left = products[0, 0].clamp_min(LEAST_FACTOR * powers[0, 0]) + DAMPING * noise[0, 0]
        factors[0] = wanted[0] / left if left > 0 else 0.0
    bias = missing.mean(1) - (factors[:, None] * ours.mean(2)).sum(0)
    factors[0] += 1
    rows = {name: factor.expand(len(bias)).float() for name, factor in zip(names, factors, strict=True)}
    return {**rows, "bias": bias.float()}


def least_kept(powers: Tensor, products: Tensor) -> float:
    """Return the smallest share that the quantized prediction keeps of any combination of the exact terms; 1 without
    loss.

    `powers` is `<e, e>` and `products` is `<e, q>`, both `[K, K]`.
    """
    values, vectors = torch.linalg.eigh(powers)
    there = values > 1e-9 * values.max()
    if not bool(there.any()):
        return 1.0
    whitening = vectors[:, there] * values[there].rsqrt()
    kept = whitening.T @ products @ whitening
    return float(torch.linalg.eigvalsh((kept + kept.T) / 2).min())


def correct_predictions(
    task: DistillationTask, config: ForeignConfig, images: int, progress: Reporter
) -> dict[str, Json]:
    """Fit the prediction tables of the student on `images` images and attach them to it.

    With guidance half as many images are sampled, since each step evaluates the network twice. `config` is the model's.

    Returns the error that was found and corrected: `prediction_slope`, the mean of the slope's error over the steps,
    and `prediction_bias`, the root mean square of the biases; for images also `prediction_detail`, the mean factor of
    detail.
    """
    sampler, trajectory = task.sampler_in_parts, task.trajectory
    guided = sampler.guidance > 1 and trajectory.null_conditions is not None
    images = -(-images // sampler.inputs_per_image(guided))
    seed = task.seed * SEED_STRIDE + SEED_OFFSET
    subjects = trajectory.draw_subjects(images, torch.Generator().manual_seed(seed), guided)
    given = trajectory.condition_rows(subjects)
    null = trajectory.null_conditions if guided else None
    noise = initial_noise(tuple(trajectory.x.shape[1:]), range(images), seed, CALIBRATION)
    seeds = image_seeds(range(images), seed, CALIBRATION)
    names = tuple(row_shapes(task.family.prediction_row(config)))
    fit = NoiseFit.while_sampling(
        sampler,
        task.student,
        task.teacher,
        noise,
        seeds,
        given,
        null,
        progress.advance,
        partial(fit_step, of_images="detail" in names),
        CallCheckpoints(task.store, f"the correction by {sampler.together}{precision_label(task.teacher)}"),
    )
    steps_of(task.student).select(torch.zeros(1, dtype=torch.long))
    found = [fit.steps[min(fit.steps, key=lambda t: abs(t - asked_at))] for asked_at in trajectory.timesteps.tolist()]
    rows = {name: torch.stack([step.rows[name].cpu() for step in found]) for name in names}  # type: ignore[attr-defined]
    tables = {name: task.family.per_channel(row, float(name == "scale"), config) for name, row in rows.items()}
    attach_prediction(task.student, tables)
    metrics: dict[str, Json] = {
        "prediction_slope": sum(step.slope for step in found) / len(found),
        "prediction_bias": float(torch.stack([step.bias for step in found]).square().mean().sqrt()),
    }
    if "detail" in rows:
        metrics["prediction_detail"] = float(rows["detail"].mean())
    return metrics

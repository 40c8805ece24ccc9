"""What a trained network's predictions still lack, step by step, fitted while it samples and from then on part of it.

The float network is asked at the points that the quantized one visits, each step corrected before the next is fitted. By
squared error alone training ends with predictions a little too small, their detail most of all, which no further pass on
that error undoes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.core.detail import detail
from dqtool.models.families import Family
from dqtool.models.sampling.noise_correction import LEAST_FACTOR, StepNoise, fit_noise
from dqtool.models.sampling.noise_fit import NoiseFit
from dqtool.models.sampling.sampler import CALIBRATION, image_seeds, initial_noise
from dqtool.nn.prediction import attach_prediction, corrected, row_shapes, same_channels
from dqtool.nn.surgery import steps_of
from dqtool.training.data import DistillationTask, Reporter

__all__ = ["correct_predictions", "fit_step", "fit_tables"]

DAMPING = 0.1
"""Share of the error's power that is added to the products, see `fit_tables`."""

SEED_STRIDE, SEED_OFFSET = 7919, 2_000_000
"""Of the images it is fitted on: neither calibration's nor those that `on_policy` samples."""


@dataclass(frozen=True)
class StepTables(StepNoise):
    """What was found at one step, and what undoes it: a row of each table by name, `[C]`."""

    rows: Mapping[str, Tensor] = field(default_factory=dict)

    def corrected(self, prediction: Tensor, inputs: Tensor) -> Tensor:
        """What the network will return once it has these rows."""
        along = (1, -1, *[1] * (prediction.dim() - 2))
        return corrected(prediction, inputs, {name: row.to(prediction).view(along) for name, row in self.rows.items()})


def fit_step(quantized: Tensor, exact: Tensor, inputs: Tensor, of_images: bool) -> StepTables:
    """A step's error and its tables, see `fit_tables`. As it will be shipped: the sampler's own noise is left alone."""
    found = fit_noise(quantized, exact)
    rows = fit_tables(quantized, exact, inputs, of_images)
    return StepTables(found.slope, found.bias, 0.0, found.correlation, rows)


def fit_tables(quantized: Tensor, exact: Tensor, inputs: Tensor, of_images: bool) -> dict[str, Tensor]:
    """The rows, `[C]` each, that take out of `quantized` what of its error is correlated with `exact`, and of images also with
    the detail of `exact`, with `inputs` and with their detail. One number serves all channels, but for `bias`.

    With the terms q of the quantized prediction and e of the exact one (the inputs' are the same), the factors w solve
    `<e, exact - quantized - w q> = 0`: instrumental variables, where least squares on q would make predictions smaller.
    Of one term that is PTQD's `1 / (1 + k)`. A tenth of the power of `q - e` is added to the products, which counts only where
    there is more noise than prediction. Where less than `LEAST_FACTOR` is left of any combination of the terms there is
    nothing to scale back: then the prediction gets one factor for the whole, as if that much were left of it.

    Args:
        quantized: `[N, C, ...]`, as are `exact` and `inputs`.
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
    """Of all combinations of the exact terms, how much the quantized prediction keeps of the one of which it keeps least: 1 of
    every one where nothing was lost. `powers` `<e, e>` and `products` `<e, q>`, `[K, K]`."""
    values, vectors = torch.linalg.eigh(powers)
    there = values > 1e-9 * values.max()
    if not bool(there.any()):
        return 1.0
    whitening = vectors[:, there] * values[there].rsqrt()
    kept = whitening.T @ products @ whitening
    return float(torch.linalg.eigvalsh((kept + kept.T) / 2).min())


def correct_predictions(
    task: DistillationTask, config: Mapping[str, Any], images: int, progress: Reporter
) -> dict[str, Any]:
    """Fit and attach the prediction tables of the student, of this model config, from `images` images (half as many with
    guidance, whose steps ask twice).

    Returns `prediction_slope` and `prediction_bias`, what was found and is taken out: the mean over the steps of the
    slope's error, and the root mean square of the biases. Of images also `prediction_detail`, the mean of the factor by
    which detail is raised.
    """
    family = task.family if task.network_batch is None else in_parts(task.family, task.network_batch)
    sampler, trajectory = task.sampler, task.trajectory
    guided = sampler.guidance > 1 and trajectory.null_conditions is not None
    images = -(-images // 2) if guided else images
    seed = task.seed * SEED_STRIDE + SEED_OFFSET
    subjects = trajectory.draw_subjects(images, torch.Generator().manual_seed(seed), guided)
    given = trajectory.condition_rows(subjects)
    null = trajectory.null_conditions if guided else None
    noise = initial_noise(tuple(trajectory.x.shape[1:]), range(images), seed, CALIBRATION)
    seeds = image_seeds(range(images), seed, CALIBRATION)
    names = tuple(row_shapes(family.prediction_row(config)))
    fit = NoiseFit.while_sampling(
        replace(sampler, family=family),
        task.student,
        task.teacher,
        noise,
        seeds,
        given,
        null,
        progress.advance,
        partial(fit_step, of_images="detail" in names),
    )
    steps_of(task.student).select(torch.zeros(1, dtype=torch.long))
    found = [fit.steps[min(fit.steps, key=lambda t: abs(t - asked_at))] for asked_at in trajectory.timesteps.tolist()]
    rows = {name: torch.stack([step.rows[name].cpu() for step in found]) for name in names}  # type: ignore[attr-defined]
    tables = {name: family.per_channel(row, float(name == "scale"), config) for name, row in rows.items()}
    attach_prediction(task.student, tables)
    metrics = {
        "prediction_slope": sum(step.slope for step in found) / len(found),
        "prediction_bias": float(torch.stack([step.bias for step in found]).square().mean().sqrt()),
    }
    return metrics | ({"prediction_detail": float(rows["detail"].mean())} if "detail" in rows else {})


def in_parts(family: Family, size: int) -> Family:
    """The same family, whose predictions are made for `size` samples at a time."""
    parts = copy.copy(family)

    def predict(model: nn.Module, x: Tensor, timestep: Tensor, conditions: Any) -> Tensor:
        pieces = [
            family.predict(model, x[i : i + size], timestep, {k: v[i : i + size] for k, v in conditions.items()})
            for i in range(0, len(x), size)
        ]
        return torch.cat(pieces)

    parts.predict = predict  # type: ignore[method-assign]
    return parts

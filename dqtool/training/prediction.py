"""What a trained network's predictions still lack, step by step: gain and offset, fitted while it samples and then part of it.

The float network is asked at the points that the quantized one visits, each step corrected before the next is fitted. By
squared error alone training ends with predictions a little too small, which no further pass on that error undoes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.models.families import Family
from dqtool.models.noise_correction import LEAST_FACTOR, NoiseFit
from dqtool.models.sampling import CALIBRATION, image_seeds, initial_noise
from dqtool.nn.prediction import attach_prediction
from dqtool.nn.surgery import steps_of
from dqtool.training.data import Problem, Reporter

__all__ = ["correct_predictions"]

SEED_STRIDE, SEED_OFFSET = 7919, 2_000_000
"""Of the images it is fitted on: neither calibration's nor those that `on_policy` samples."""


class StepFit(NoiseFit):
    """As it will be shipped: predictions are corrected, the sampler's own noise is left alone."""

    def variance(self, timestep: Tensor) -> float:
        """None is taken from that noise."""
        return 0.0


def correct_predictions(problem: Problem, config: Mapping[str, Any], images: int, progress: Reporter) -> dict[str, Any]:
    """Fit and attach the prediction tables of the student, of this model config, from `images` images (half as many with
    guidance, whose steps ask twice).

    Returns `prediction_slope` and `prediction_bias`, what was found and is taken out: the mean over the steps of the
    slope's error, and the root mean square of the biases.
    """
    family = problem.family if problem.network_batch is None else in_parts(problem.family, problem.network_batch)
    sampler, trajectory = problem.sampler, problem.trajectory
    guided = sampler.guidance > 1 and trajectory.null is not None
    images = -(-images // 2) if guided else images
    seed = problem.seed * SEED_STRIDE + SEED_OFFSET
    subjects = trajectory.draw_subjects(images, torch.Generator().manual_seed(seed), guided)
    given = trajectory.tabled(subjects)
    null = trajectory.null if guided else None
    noise = initial_noise(tuple(trajectory.x.shape[1:]), range(images), seed, CALIBRATION)
    seeds = image_seeds(range(images), seed, CALIBRATION)
    fit = StepFit.while_sampling(
        replace(sampler, family=family), problem.student, problem.teacher, noise, seeds, given, null, progress.advance
    )
    steps_of(problem.student).select(torch.zeros(1, dtype=torch.long))
    found = [fit.steps[min(fit.steps, key=lambda t: abs(t - asked_at))] for asked_at in trajectory.timesteps.tolist()]
    factors = torch.tensor([[1 / max(1 + step.slope, LEAST_FACTOR)] for step in found])
    biases = torch.stack([step.bias.cpu() for step in found])
    scale, bias = factors.expand_as(biases), -factors * biases
    attach_prediction(problem.student, family.per_channel(scale, 1.0, config), family.per_channel(bias, 0.0, config))
    return {
        "prediction_slope": sum(step.slope for step in found) / len(found),
        "prediction_bias": float(biases.square().mean().sqrt()),
    }


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

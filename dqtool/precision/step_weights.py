"""Share of an error in one prediction that reaches the sample, for each step, measured on the sampler itself."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.models.sampling.sampler import Sampler
from dqtool.nn.steps import nearest_rows
from dqtool.training.data import Trajectory

__all__ = ["step_weights"]

PULSE = 0.05
"""Size of the error that is followed, that of a quantized network's: clipping of predictions acts on it as it will."""

DATA_STD = 0.5
"""Standard deviation of samples, EDM's value for images in [-1, 1]."""


def step_weights(sampler: Sampler, trajectory: Trajectory) -> Tensor:
    """Return for each timestep of `trajectory` the change of the sample per unit of error in the prediction there, `[T]`.

    One step's response comes from the sampler, run with a network that predicts zero but for one constant error; so
    preconditioning and the size of the step count. What later steps make of the change is taken from Gaussian data, where it
    stays the same share of the state's standard deviation (`std(sample) / std(state)`, the latter from the trajectory). With
    guidance the errors of the two predictions add in squares.
    """
    alone = replace(sampler, guidance=1.0, image_guidance=None, correction=None)
    timesteps = trajectory.timesteps
    states, calls = _run(alone, trajectory, None)
    rows = nearest_rows(torch.tensor(calls, dtype=torch.float64), timesteps.double()).tolist()
    deviations = [float(trajectory.x[trajectory.rows == row].std()) for row in range(len(timesteps))]
    squares = torch.zeros(len(timesteps), dtype=torch.float64)
    for call, row in enumerate(rows):
        changed, _ = _run(alone, trajectory, call)
        response = float((changed[call + 1] - states[call + 1]).double().square().mean().sqrt()) / PULSE
        if call + 1 < len(rows):
            response *= DATA_STD / max(deviations[rows[call + 1]], 1e-6)
        squares[row] += response**2
    if sampler.guidance > 1:
        weight, of_image = sampler.guidance, 1.0 if sampler.image_guidance is None else sampler.image_guidance
        squares *= weight**2 + (weight - of_image) ** 2 + (of_image - 1) ** 2
    return squares.sqrt()


def _run(sampler: Sampler, trajectory: Trajectory, pulse: int | None) -> tuple[list[Tensor], list[float]]:
    """Sample from zeros with a network that predicts zero, but for `PULSE` in call number `pulse`; return the network's
    inputs and the sample, and the timesteps of the calls."""
    family = copy.copy(sampler.family)
    states: list[Tensor] = []
    calls: list[float] = []

    def predict(_model: nn.Module, x: Tensor, timestep: Tensor, _conditions: Mapping[str, Any]) -> Tensor:
        value = PULSE if len(calls) == pulse else 0.0
        calls.append(float(timestep.reshape(-1)[0]))
        states.append(x)
        return torch.full_like(x, value)

    family.predict = predict  # type: ignore[method-assign,assignment]
    noise = torch.zeros(1, *trajectory.x.shape[1:])
    states.append(replace(sampler, family=family).run(nn.Linear(1, 1), noise, {}, seeds=[0]))
    return states, calls

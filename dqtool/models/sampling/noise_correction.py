"""PTQD's correction of the quantization error of predicted noise (arXiv 2305.10657), for every sampler.

With `e` the float network's prediction and `e^` the quantized one's, `e^ = e + k e + b_c + r`: a part that is correlated
with the prediction (Eq. 10: k by least squares), a bias of each channel, and an uncorrelated residual. At each step the
sampler receives `(e^ - b_c) / (1 + k) = e + r / (1 + k)`. Where the sampler adds noise of its own (eta > 0), the variance
of that noise is reduced by the variance of the residual (Eq. 17).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dqtool.nn.steps import look_up

__all__ = ["NoiseCorrection", "StepNoise", "fit_noise", "noise_scale", "response"]

LEAST_FACTOR = 0.1
"""Smallest value of 1 + k; a network that lost the prediction altogether can't be scaled back."""


@dataclass(frozen=True)
class StepNoise:
    """Correction of one step: `slope` k, `bias` b_c `[C]`, and `variance`, the mean square of the residual after correction.

    `correlation` is the correlation of `e^ - e` with `e` before correction.
    """

    slope: float
    bias: Tensor
    variance: float
    correlation: float = 0.0

    def corrected(self, prediction: Tensor, inputs: Tensor) -> Tensor:
        """Return `(e^ - b_c) / (1 + k)`, `[N, C, ...]`; `inputs` are ignored."""
        bias = self.bias.to(prediction.dtype).view(1, -1, *[1] * (prediction.dim() - 2))
        return (prediction - bias) / max(1 + self.slope, LEAST_FACTOR)


def fit_noise(quantized: Tensor, exact: Tensor, _inputs: Tensor | None = None) -> StepNoise:
    """Fit `quantized - exact` on `exact` by least squares with one intercept per channel; both are `[N, C, ...]`."""
    e = exact.double().transpose(0, 1).flatten(1)  # [C, n]
    error = quantized.double().transpose(0, 1).flatten(1) - e
    centred, errors = e - e.mean(1, keepdim=True), error - error.mean(1, keepdim=True)
    power, noise = centred.square().sum(), errors.square().sum()
    product = (centred * errors).sum()
    slope = float(product / power) if power > 0 else 0.0
    bias = error.mean(1) - slope * e.mean(1)
    rest = errors - slope * centred
    variance = float(rest.square().mean()) / max(1 + slope, LEAST_FACTOR) ** 2
    correlation = float(product / (power * noise).sqrt()) if power > 0 and noise > 0 else 0.0
    return StepNoise(slope, bias.float(), variance, correlation)


@dataclass
class NoiseCorrection:
    """Corrections by timestep. A prediction at a timestep without a correction stays unchanged."""

    steps: dict[float, StepNoise] = field(default_factory=dict)

    def corrected(self, prediction: Tensor, timestep: Tensor, inputs: Tensor) -> Tensor:
        """Return the corrected `prediction`, the network's output for `inputs`, both `[N, C, ...]`."""
        found = self._at(timestep)
        return prediction if found is None else found.corrected(prediction, inputs)

    def variance(self, timestep: Tensor) -> float:
        """Return the mean square of the residual at this step."""
        found = self._at(timestep)
        return 0.0 if found is None else found.variance

    def _at(self, timestep: Tensor) -> StepNoise | None:
        """Return the correction of this timestep, or None where there is none."""
        if not self.steps:
            return None
        row, missed = look_up(timestep.reshape(1).cpu(), torch.tensor(list(self.steps), dtype=torch.float64))
        return None if bool(missed) else list(self.steps.values())[int(row)]

    def to_json(self) -> list[dict[str, Any]]:
        """Return JSON values, one entry per step in sampling order."""
        return [
            {
                "timestep": timestep,
                "slope": step.slope,
                "bias": step.bias.tolist(),
                "variance": step.variance,
                "correlation": step.correlation,
            }
            for timestep, step in self.steps.items()
        ]

    @classmethod
    def from_json(cls, entries: list[Mapping[str, Any]]) -> NoiseCorrection:
        """Build the correction from the output of `to_json`."""
        return cls(
            {
                float(each["timestep"]): StepNoise(
                    each["slope"], torch.tensor(each["bias"]), each["variance"], each["correlation"]
                )
                for each in entries
            }
        )


def noise_scale(scheduler: Any, timestep: Tensor, eta: float) -> float:
    """Return the standard deviation of the noise that `scheduler.step` adds at this timestep.

    It is 0 where the scheduler adds none or the deviation is unknown (learned variances, samplers with a history).
    """
    name, t = type(scheduler).__name__, int(timestep)
    if name == "DDIMScheduler":
        before = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        return float(eta * float(scheduler._get_variance(t, before)) ** 0.5)
    if name == "ListedDDIMScheduler":
        return float(eta * float(scheduler._get_variance(t, scheduler.before(t))) ** 0.5)
    if name == "DDPMScheduler" and t > 0:
        kind = scheduler.config.variance_type
        if kind in ("fixed_small", "fixed_large"):
            return float(float(scheduler._get_variance(t)) ** 0.5)
        if kind == "fixed_small_log":  # diffusers returns the deviation here
            return float(scheduler._get_variance(t))
    return 0.0


def response(scheduler: Any, timestep: Tensor, extra: Mapping[str, Any]) -> float:
    """Return `c_t`, the change of the next sample per unit change of the prediction, from two steps with equal noise.

    The change is small, so that samplers that clip the predicted image are evaluated within the clip.
    """
    moved, start = 1e-3, torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    results = []
    for shift in (0.0, moved):
        given = {k: v for k, v in extra.items() if k != "generator"}
        if "generator" in extra:
            given["generator"] = torch.Generator().manual_seed(0)
        results.append(scheduler.step(start + shift, timestep, start, **given).prev_sample)
    return float((results[1] - results[0]).double() / moved)

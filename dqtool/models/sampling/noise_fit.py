"""Fit of PTQD's noise correction during sampling: the float network predicts at every step of the quantized one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import CallCheckpoints
from dqtool.models.sampling.noise_correction import NoiseCorrection, StepNoise, fit_noise
from dqtool.models.sampling.sampler import Sampler

__all__ = ["NoiseFit", "StepFit"]

StepFit = Callable[[Tensor, Tensor, Tensor], StepNoise]
"""Function that fits one step from the quantized prediction, the exact one and the inputs, `[N, C, ...]` each."""


class NoiseFit(NoiseCorrection):
    """Correction that fits and applies each step when sampling reaches it.

    Later steps are therefore fitted at points that corrected sampling visits. Pass the object to `Sampler.run` both as
    `correction` and as `observer`.

    `conditions` are the network's conditions, `[N, ...]` each, of all inputs under guidance. `guided` makes one prediction of
    theirs. `fit` returns a step's correction from the quantized prediction, the exact one and the inputs, `[N, C, ...]` each.
    `calls` answers for the float network what it answered in an interrupted run.
    """

    def __init__(
        self,
        sampler: Sampler,
        exact: nn.Module,
        conditions: Mapping[str, Tensor],
        guided: Callable[[Tensor], Tensor] | None,
        fit: StepFit = fit_noise,
        calls: CallCheckpoints | None = None,
    ) -> None:
        super().__init__()
        self.sampler, self.exact, self.conditions = sampler, exact, conditions
        self.guided, self.fit, self.calls = guided, fit, calls

    def __call__(self, x: Tensor, timestep: Tensor, prediction: Tensor) -> None:
        """Fit this step by comparing `prediction` with the float network's at the inputs `x` `[N, C, H, W]`."""
        with torch.no_grad():
            exact = self.sampler.predict(self.exact, x, timestep, self.conditions, self.calls).to(prediction.device)
        pair = [(each if self.guided is None else self.guided(each))[:, : x.shape[1]] for each in (prediction, exact)]
        self.steps[float(timestep)] = self.fit(pair[0], pair[1], x[-len(pair[0]) :])

    @classmethod
    def while_sampling(
        cls,
        sampler: Sampler,
        quantized: nn.Module,
        exact: nn.Module,
        noise: Tensor,
        seeds: list[int],
        given: Mapping[str, Tensor],
        null: Mapping[str, Tensor] | None,
        advance: Callable[[], None],
        fit: StepFit = fit_noise,
        calls: CallCheckpoints | None = None,
    ) -> Self:
        """Sample `quantized` from `noise` as `Sampler.run` does and return the fit; `advance` is called after each step.

        `calls` keeps the predictions of both networks for an interrupted run.
        """
        guided = sampler.guidance > 1 and null is not None
        asked = sampler.asked(given, null) if guided and null is not None else given
        found = cls(sampler, exact, asked, sampler.guided if guided else None, fit, calls)

        def see(x: Tensor, timestep: Tensor, prediction: Tensor) -> None:
            found(x, timestep, prediction)
            advance()

        replace(sampler, correction=found).run(quantized, noise, given, seeds, see, null, calls)
        return found

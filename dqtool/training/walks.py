"""Images that the student samples while it trains, each at another step: every forward pass of training is one of
sampling too, so that each point is new and costs no pass of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor

from dqtool.core.device import beside
from dqtool.models.sampling import CALIBRATION, Call, image_seeds, initial_noise
from dqtool.training.data import Problem

__all__ = ["Points", "Walks"]


@dataclass(frozen=True)
class Points:
    """Where the walks are: `x` `[N, C, H, W]`, `timesteps` and their `rows` of the step tables `[N]`, `conditions`
    `[N, ...]` each."""

    x: Tensor
    timesteps: Tensor
    rows: Tensor
    conditions: dict[str, Tensor]


class Walks:
    """`samples` inputs of the network at a time, spread evenly over the steps. Ask `points`, then `go_on` with the
    student's predictions there; a walk that has ended begins again with a new image.

    With guidance an image takes two inputs. Conditions are drawn from those of the calibration set.
    """

    def __init__(self, problem: Problem, samples: int, seed: int) -> None:
        self.problem, self.seed = problem, seed
        trajectory, sampler = problem.trajectory, problem.sampler
        self.null = trajectory.null if sampler.guidance > 1 else None
        images = samples if self.null is None else -(-samples // 2)
        calls = len(sampler.timesteps())
        self.together = -(-images // calls)
        self.count = 0
        self.generator = torch.Generator().manual_seed(seed)
        self.walks: list[Generator[Call, Tensor, Tensor]] = []
        self.calls: list[Call] = []
        number = max(1, images // self.together)
        for k in range(number):
            walk, call = self._begin()
            for _ in range(k * calls // number):
                call = walk.send(self._predict(call))
            self.walks.append(walk)
            self.calls.append(call)

    def points(self) -> Points:
        """Where all are now."""
        sizes = [len(call.x) for call in self.calls]
        timesteps = torch.stack([torch.as_tensor(call.timestep).cpu() for call in self.calls])
        rows = (self.problem.trajectory.timesteps - timesteps[:, None]).abs().argmin(1)
        repeats = torch.tensor(sizes)
        conditions = {
            key: torch.cat([call.conditions[key] for call in self.calls]) for key in self.problem.trajectory.conditions
        }
        x = torch.cat([call.x for call in self.calls])
        return Points(x, timesteps.repeat_interleave(repeats), rows.repeat_interleave(repeats), conditions)

    def go_on(self, predictions: Tensor) -> None:
        """One step of each, by these predictions."""
        parts = predictions.detach().split([len(call.x) for call in self.calls])
        for i, part in enumerate(parts):
            try:
                self.calls[i] = self.walks[i].send(part)
            except StopIteration:
                self.walks[i], self.calls[i] = self._begin()

    def _begin(self) -> tuple[Generator[Call, Tensor, Tensor], Call]:
        trajectory = self.problem.trajectory
        images = range(self.count, self.count + self.together)
        self.count += self.together
        subjects = trajectory.draw_subjects(self.together, self.generator, guided=self.null is not None)
        given = {k: v[subjects] for k, v in trajectory.conditions.items()}
        noise = initial_noise(tuple(trajectory.x.shape[1:]), images, self.seed, CALIBRATION)
        noise, given, null = beside(self.problem.student, (noise, given, self.null))
        walk = self.problem.sampler.walk(noise, given, image_seeds(images, self.seed, CALIBRATION), null)
        return walk, next(walk)

    @torch.no_grad()
    def _predict(self, call: Call) -> Tensor:
        return self.problem.family.predict(self.problem.student, call.x, call.timestep, dict(call.conditions))

"""Input of a training method: the float network, the quantized network to train, and the trajectory to train it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import PieceStore
from dqtool.core.device import pick
from dqtool.graph.network import NetworkGraph
from dqtool.graph.roles import Roles
from dqtool.graph.trace import Trace
from dqtool.models.families import Family
from dqtool.models.sampling.sampler import Sampler
from dqtool.nn.steps import calibrated_points
from dqtool.nn.surgery import steps_of
from dqtool.scaling.folding import Fold
from dqtool.scaling.learning import merge_learned

__all__ = ["Bars", "DistillationTask", "Reporter", "Trajectory"]


@dataclass
class Trajectory:
    """Points (x_t, t) of the reverse process: `x` `[N, C, H, W]` and `rows` `[N]`, indices into `timesteps` `[T]`.

    `conditions` are tables `[K, ...]`; sample n has row `subjects[n]` of each.
    """

    x: Tensor
    rows: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor] = field(default_factory=dict)
    subjects: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Trajectory:
        """Return the trajectory that a calibrated artifact holds."""
        conditions = {k.removeprefix("condition."): v for k, v in tensors.items() if k.startswith("condition.")}
        points, rows = tensors["trajectory.x"], tensors["trajectory.rows"]
        return cls(points, rows, tensors["timesteps"], conditions, tensors.get("trajectory.subjects"))

    def __len__(self) -> int:
        return len(self.x)

    def arguments(self, rows: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return `x`, timesteps and conditions of the samples `rows` (a slice or an index tensor)."""
        return pick(self.x, rows), self.timesteps[self.rows[rows]], self.conditions_of(rows)

    def conditions_of(self, rows: Any) -> dict[str, Tensor]:
        """Return the conditions of the samples `rows` (a slice or an index tensor)."""
        return {} if self.subjects is None else self.condition_rows(self.subjects[rows])

    def condition_rows(self, subjects: Tensor) -> dict[str, Tensor]:
        """Return the rows `subjects` of each table of conditions."""
        return {k: v[subjects] for k, v in self.conditions.items()}

    @property
    def null_subject(self) -> int:
        """Index of the last row of the tables, which is the null condition of guided sampling."""
        return len(next(iter(self.conditions.values()))) - 1

    @property
    def null_conditions(self) -> dict[str, Tensor] | None:
        """Null condition, `[1, ...]` of each table; None for an unconditional network."""
        return {k: v[-1:] for k, v in self.conditions.items()} if self.conditions else None

    def draw_subjects(self, count: int, generator: torch.Generator, guided: bool) -> Tensor:
        """Draw `count` rows of the tables with the frequencies of the trajectory; with `guided`, leave out the null
        condition."""
        if self.subjects is None:
            return torch.zeros(count, dtype=torch.long)
        among = self.subjects[self.subjects != self.null_subject] if guided else self.subjects
        return among[torch.randint(len(among), (count,), generator=generator)]

    def step_mask(self, samples: Tensor) -> Tensor:
        """Return the bool mask `[T]` of the steps of these samples."""
        mask = torch.zeros(len(self.timesteps), dtype=torch.bool)
        mask[self.rows[samples]] = True
        return mask

    def few_of_each_step(self, steps: int, per_step: int) -> tuple[Tensor, list[int]]:
        """Return indices of up to `per_step` samples at each of `steps` evenly spread steps, and the number of samples
        of each step.

        The indices are ordered by step.
        """
        present = self.rows.unique()  # some draws keep points of a subset of the steps
        wanted = present[torch.linspace(0, len(present) - 1, min(steps, len(present))).round().long()]
        chosen = [(self.rows == step).nonzero()[:per_step, 0] for step in wanted.tolist()]
        return torch.cat(chosen), [len(part) for part in chosen]

    def subset(self, count: int, seed: int) -> Trajectory:
        """Return `count` of the points in their order, spread evenly over the steps and drawn at random within each
        step.

        A step with fewer points than its share contributes all of them.
        """
        generator = torch.Generator().manual_seed(seed)
        steps = len(self.timesteps)
        quotas = [count // steps] * steps
        for row in torch.randperm(steps, generator=generator)[: count % steps].tolist():
            quotas[row] += 1
        picked = []
        for row, quota in enumerate(quotas):
            pool = (self.rows == row).nonzero()[:, 0]
            picked.append(pool[torch.randperm(len(pool), generator=generator)[:quota]])
        chosen = torch.cat(picked).sort().values
        subjects = None if self.subjects is None else self.subjects[chosen]
        return replace(self, x=self.x[chosen], rows=self.rows[chosen], subjects=subjects)


class Reporter(Protocol):
    """Receiver of training progress (`dqtool.report.Progress`, for instance)."""

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Report `n` more finished iterations."""

    def skip(self, n: int = 1, note: str | None = None) -> None:
        """Report `n` iterations that an earlier run finished."""


Bars = Callable[[str, int], AbstractContextManager[Reporter]]
"""Function (label, number of iterations) that opens a progress bar."""


@dataclass
class DistillationTask:
    """Everything that a training method needs. `student` starts as the calibrated (PTQ) network and ends trained.

    Attributes:
        only: names of the blocks to train; None trains all.
        repair_iters: iterations of the sweep in order that follows a sweep of all blocks at once; None trains in order alone.
        shifts: producers that absorb learned shifts.
        checkpoint_seconds: interval at which a method without finished blocks saves its state in `store`.
        cache_bytes: memory for the activations that blocks read, of both networks together; the rest goes to disk.
        replay_batch: samples that run together where inputs and outputs of a block are computed.
        network_batch: samples that run together where the whole network learns or samples; None runs all of them.
        sampled_together: inputs that the network gets at once where it samples; `network_batch` goes before it.
        strict: a divergence raises an error.
        warnings: receives a sentence about each part that could not be trained.
    """

    family: Family
    teacher: nn.Module
    student: nn.Module
    trace: Trace
    trajectory: Trajectory
    sampler: Sampler
    seed: int
    store: PieceStore
    graph: NetworkGraph
    only: list[str] | None = None
    repair_iters: int | None = None
    shifts: Mapping[str, Fold] = field(default_factory=dict)
    checkpoint_seconds: float = 30.0
    cache_bytes: int = 6 << 30
    replay_batch: int = 256
    network_batch: int | None = None
    sampled_together: int | None = None
    strict: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def low_memory(self) -> bool:
        """True if memory is limited, so that tensors without an immediate use should be released."""
        return self.network_batch is not None

    @property
    def sampler_in_parts(self) -> Sampler:
        """Sampler that gives a network as many inputs at once as memory allows."""
        return replace(self.sampler, together=self.network_batch or self.sampled_together)

    def drop_teacher(self) -> None:
        """Free the weights of the float network, which must not be used afterwards."""
        self.teacher.to("meta")

    def predict(self, model: nn.Module, samples: Any, trajectory: Trajectory | None = None) -> Tensor:
        """Return the prediction of `model` at the points `samples` of the trajectory, or of another one with its timesteps."""
        x, timestep, conditions = (self.trajectory if trajectory is None else trajectory).arguments(samples)
        with calibrated_points():
            return self.family.predict(model, x, timestep, conditions)

    def select_rows(self, samples: Any) -> None:
        """Select the student's step tables for these samples, before a block is called outside the network."""
        steps_of(self.student).select(self.trajectory.rows[samples])

    def merge_scaling(self) -> None:
        """End the learning of scaling factors, if any, and merge the factors into the network."""
        merge_learned(self.student, self.shifts)

    def roles(self) -> Roles:
        """Return the role of each layer."""
        return self.graph.roles

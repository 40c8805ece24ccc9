"""What a training method is given: the float network, the quantized one to train, and the trajectory to train it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dqtool.graph.network import NetworkGraph
from dqtool.graph.roles import Roles
from dqtool.graph.trace import Trace
from dqtool.models.families import Family
from dqtool.models.sampling.sampler import Sampler
from dqtool.nn.surgery import steps_of
from dqtool.scaling.folding import Fold
from dqtool.scaling.learning import merge_learned

__all__ = ["Bars", "BlockStore", "DistillationTask", "Reporter", "Trajectory"]


@dataclass
class Trajectory:
    """Points (x_t, t) of the reverse process: `x` `[N, C, H, W]`, `rows` `[N]` into `timesteps` `[T]`.

    `conditions` are tables `[K, ...]` of which sample n has row `subjects[n]`.
    """

    x: Tensor
    rows: Tensor
    timesteps: Tensor
    conditions: dict[str, Tensor] = field(default_factory=dict)
    subjects: Tensor | None = None

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Trajectory:
        """The one that a calibrated artifact holds."""
        conditions = {k.removeprefix("condition."): v for k, v in tensors.items() if k.startswith("condition.")}
        points, rows = tensors["trajectory.x"], tensors["trajectory.rows"]
        return cls(points, rows, tensors["timesteps"], conditions, tensors.get("trajectory.subjects"))

    def __len__(self) -> int:
        return len(self.x)

    def arguments(self, rows: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """`x`, timestep and conditions of the samples `rows` (a slice or an index tensor)."""
        return self.x[rows], self.timesteps[self.rows[rows]], self.conditions_of(rows)

    def conditions_of(self, rows: Any) -> dict[str, Tensor]:
        """The conditions of the samples `rows`."""
        return {} if self.subjects is None else self.condition_rows(self.subjects[rows])

    def condition_rows(self, subjects: Tensor) -> dict[str, Tensor]:
        """These rows of the conditions' tables."""
        return {k: v[subjects] for k, v in self.conditions.items()}

    @property
    def null_subject(self) -> int:
        """The last row of the tables, which stands for no condition where sampling is guided."""
        return len(next(iter(self.conditions.values()))) - 1

    @property
    def null_conditions(self) -> dict[str, Tensor] | None:
        """That row of each table, `[1, ...]`; None for an unconditional network."""
        return {k: v[-1:] for k, v in self.conditions.items()} if self.conditions else None

    def draw_subjects(self, count: int, generator: torch.Generator, guided: bool) -> Tensor:
        """Rows of the tables `[count]`, drawn as often as the trajectory has them; `guided`: without the null one."""
        if self.subjects is None:
            return torch.zeros(count, dtype=torch.long)
        among = self.subjects[self.subjects != self.null_subject] if guided else self.subjects
        return among[torch.randint(len(among), (count,), generator=generator)]

    def step_mask(self, samples: Tensor) -> Tensor:
        """Mask `[T]` of the steps that these samples are at."""
        mask = torch.zeros(len(self.timesteps), dtype=torch.bool)
        mask[self.rows[samples]] = True
        return mask

    def few_of_each_step(self, steps: int, per_step: int) -> tuple[Tensor, list[int]]:
        """Return the indices of up to `per_step` samples at each of `steps` steps spread evenly, ordered by step, and how
        many samples each of these steps has."""
        present = self.rows.unique()  # some draws keep points of some steps only
        wanted = present[torch.linspace(0, len(present) - 1, min(steps, len(present))).round().long()]
        chosen = [(self.rows == step).nonzero()[:per_step, 0] for step in wanted.tolist()]
        return torch.cat(chosen), [len(part) for part in chosen]

    def subset(self, count: int, seed: int) -> Trajectory:
        """`count` of the points, spread evenly over the steps and drawn at random within each, in their order.

        A step that has fewer than its share gives all it has.
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


class BlockStore(Protocol):
    """Where finished blocks are kept, so that an interrupted run goes on from there."""

    def load(self, key: str) -> Mapping[str, Tensor] | None:
        """What was saved under `key`."""

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep these tensors."""


class Reporter(Protocol):
    """Who is told how far training is (`dqtool.report.Progress`, say)."""

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """`n` more iterations are done."""

    def skip(self, n: int = 1, note: str | None = None) -> None:
        """`n` iterations were done by an earlier run."""


Bars = Callable[[str, int], AbstractContextManager[Reporter]]
"""Opens a bar: what is counted, and how many iterations there will be."""


@dataclass
class DistillationTask:
    """Everything a training method needs. `student` starts as the calibrated (PTQ) network and ends trained.

    `only` names the blocks to train (None: all), `shifts` the producers that absorb learned shifts;
    `checkpoint_seconds` is how often a method without finished blocks keeps its state in `store`, `cache_bytes` what the activations that blocks
    read may take in memory, of the float and of the quantized network together, before they go to disk; `replay_batch` how many
    samples run together where a block's inputs and outputs are computed, `network_batch` how many
    where a whole network learns or samples (None: all there are). `strict` makes a divergence an error; otherwise `warnings`
    collects sentences about what could not be trained.
    """

    family: Family
    teacher: nn.Module
    student: nn.Module
    trace: Trace
    trajectory: Trajectory
    sampler: Sampler
    seed: int
    store: BlockStore
    graph: NetworkGraph
    only: list[str] | None = None
    shifts: Mapping[str, Fold] = field(default_factory=dict)
    checkpoint_seconds: float = 30.0
    cache_bytes: int = 6 << 30
    replay_batch: int = 256
    network_batch: int | None = None
    strict: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def low_memory(self) -> bool:
        """Whether few samples run together, and what isn't needed now should not be in memory."""
        return self.network_batch is not None

    def drop_teacher(self) -> None:
        """The float network is not needed any more: let go of its weights."""
        self.teacher.to("meta")

    def predict(self, model: nn.Module, samples: Any) -> Tensor:
        """A network's prediction at trajectory points."""
        x, timestep, conditions = self.trajectory.arguments(samples)
        return self.family.predict(model, x, timestep, conditions)

    def select_rows(self, samples: Any) -> None:
        """Point the student's step tables at these samples' steps (when a block is called outside of the network)."""
        steps_of(self.student).select(self.trajectory.rows[samples])

    def merge_scaling(self) -> None:
        """End the learning of scaling factors, if any: they become part of the network."""
        merge_learned(self.student, self.shifts)

    def roles(self) -> Roles:
        """Return the part that each layer plays."""
        return self.graph.roles

"""Block-wise Knowledge Distillation (Eq. 25-27 of arXiv 2409.14307).

Each block, in execution order, learns the float network's output from the output of the *quantized* prefix, so that
later blocks correct the errors of earlier ones. Weights, biases, weight scales and step tables learn together.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.block_loop import Learner, MakeLearner, make_trainable, train_blocks
from dqtool.training.blocks_at_once import train_at_once
from dqtool.training.data import Bars, DistillationTask, Reporter
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import BkdOptions, Rates

__all__ = ["BkdLearner", "distill_at_once", "distill_blocks"]


REPAIR_RATE = 0.25
"""Factor of the rates where blocks are repaired. The full rates undo in few iterations what the blocks learned, and those of
the pass over all blocks repair less."""


class Schedule(Protocol):
    """Part of the options of methods that train blocks by `BkdLearner`."""

    @property
    def iters(self) -> int:
        """Iterations of each block."""

    @property
    def batch_size(self) -> int:
        """Samples of an iteration."""

    @property
    def rates(self) -> Rates:
        """Learning rates."""


class BkdLearner(Learner):
    """Trains all weights and quantizers of a block with a cosine schedule."""

    def __init__(self, task: DistillationTask, block: nn.Module, rates: Rates, iters: int, batch_size: int) -> None:
        make_trainable(block, [task.student.get_submodule(info.name) for info in task.trace.blocks])
        super().__init__(task, QuantAdam(block, rates), iters, batch_size)

    def rate_factor(self, step: int) -> float:
        """Return the cosine factor, which falls from 1 to 0."""
        return cosine(step, self.iters)


def distill_blocks(task: DistillationTask, options: BkdOptions, progress: Reporter) -> dict[str, Json]:
    """Train every block of `task.student` in place; return the metrics of `train_blocks`."""
    return train_blocks(
        task,
        lambda block: BkdLearner(task, block, options.rates, options.iters, options.batch_size),
        progress,
    )


def distill_at_once(task: DistillationTask, options: Schedule, bars: Bars) -> dict[str, Json]:
    """Train all blocks at once, each from the float prefix, then in order for `task.repair_iters` iterations from the quantized
    one; return the metrics of both sweeps."""

    def make(iters: int, rates: Rates) -> MakeLearner:
        return lambda block: BkdLearner(task, block, rates, iters, options.batch_size)

    metrics = train_at_once(task, make(options.iters, options.rates), options.iters, bars)
    if task.repair_iters:
        count = len(task.trace.blocks if task.only is None else task.only)
        with bars("blocks, repair", task.repair_iters * count) as progress:
            again = train_blocks(task, make(task.repair_iters, options.rates.times(REPAIR_RATE)), progress, "repair ")
        metrics |= {f"repair_{name.removeprefix('loss_')}": value for name, value in again.items()}
    return metrics

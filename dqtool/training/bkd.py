"""Block-wise Knowledge Distillation (Eq. 25-27 of arXiv 2409.14307).

Each block, in execution order, learns the float network's output from the output of the *quantized* prefix, so that
later blocks correct the errors of earlier ones. Weights, biases, weight scales and step tables learn together.
"""

from __future__ import annotations

from torch import nn

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.block_loop import Learner, make_trainable, train_blocks
from dqtool.training.data import DistillationTask, Reporter
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import BkdOptions, Rates

__all__ = ["BkdLearner", "distill_blocks"]


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

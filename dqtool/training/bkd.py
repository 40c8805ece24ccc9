"""Block-wise Knowledge Distillation (Eq. 25-27): each block, in execution order, learns to give the float network's output
from the *quantized* prefix's, so that later blocks repair what earlier ones left. Weights, biases, weight scales and
step tables learn at once.
"""

from __future__ import annotations

from torch import nn

from dqtool.training.block_loop import Learner, make_trainable, train_blocks
from dqtool.training.data import DistillationTask, Reporter
from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import BkdOptions, Rates

__all__ = ["BkdLearner", "distill_blocks"]


class BkdLearner(Learner):
    """Everything a block has learns, at rates that fall as a cosine."""

    def __init__(self, task: DistillationTask, block: nn.Module, rates: Rates, iters: int, batch_size: int) -> None:
        make_trainable(block, [task.student.get_submodule(info.name) for info in task.trace.blocks])
        super().__init__(task, QuantAdam(block, rates), iters, batch_size)

    def rate_factor(self, step: int) -> float:
        """From 1 to 0."""
        return cosine(step, self.iters)


def distill_blocks(task: DistillationTask, options: BkdOptions, progress: Reporter) -> dict:
    """Train every block of `task.student` in place; metrics as of `train_blocks`."""
    return train_blocks(
        task,
        lambda block: BkdLearner(task, block, options.rates, options.iters, options.batch_size),
        progress,
    )

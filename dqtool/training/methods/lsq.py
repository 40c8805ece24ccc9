"""`lsq`: end-to-end quantization-aware training (Learned Step Size Quantization, arXiv 1902.08153).

All weights, biases and quantizers learn together to reproduce the float network's prediction on the recorded
trajectory. The quantizers are those of every other method and start at their PTQ values: per-channel weight scales, and
activation scales and zero points for each step (one for all steps with `--static`).

The rates are 0.3 of those of `on-policy`. Higher ones lower the error of single predictions as far, on recorded and on fresh points,
but images are worse: what remains adds up over the steps (`make lsq-points`).

The gradient of a scale is divided by sqrt(N · Q), as in the paper. Adam normalises gradients, so the division changes
only the last bits; the rates balance scales and weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method
from dqtool.training.options import Rates

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


@dataclass(frozen=True)
class LsqOptions:
    """Options of `lsq`: `iters` is the number of iterations of the whole network."""

    iters: int = 3000
    batch_size: int = 32
    rates: Rates = field(default_factory=lambda: Rates(weight=0.02).times(0.3))


def train(task: DistillationTask, options: LsqOptions, bars: Bars) -> dict[str, Json]:
    """Train all weights and quantizers end to end; return metrics."""
    from dqtool.training.block_loop import make_trainable
    from dqtool.training.network_loop import mixed_steps, train_network
    from dqtool.training.optimizer import QuantAdam
    from dqtool.training.scale_gradients import scaled_gradients

    make_trainable(task.student)
    choose = mixed_steps(task, options.batch_size)
    optimizer = QuantAdam(task.student, options.rates)
    with bars("network", options.iters) as progress, scaled_gradients(task):
        return train_network(task, optimizer, choose, options.iters, options.batch_size, progress)


METHOD = Method("lsq", "end to end, all weights", LsqOptions, train, lambda options, _: f"{options.iters}")

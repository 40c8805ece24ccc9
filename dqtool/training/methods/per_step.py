"""`per-step`: TFMQ-DM (arXiv 2311.16503), a separate time-embedding block and static quantizers for each step.

The layers on the timestep's path learn their rounding together, on the outputs of the path. Each block then learns the
rounding of its other weights with float activations, as the authors do, and finally its activation scales, one step at
a time from the samples of that step (their finite set calibration, made learnable). With one step for all (`--static`)
this gives an ordinary static quantizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method
from dqtool.training.options import PerStepOptions

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


def train(task: DistillationTask, options: PerStepOptions, bars: Bars) -> dict[str, Json]:
    """Train the timestep's path, unless only some blocks are chosen, and then the blocks; return metrics."""
    from torch import nn

    from dqtool.training.block_loop import train_blocks
    from dqtool.training.curve import curve
    from dqtool.training.per_step import PerStepLearner, untrained_layers
    from dqtool.training.temporal import temporal_layers, train_temporal

    task.merge_scaling()
    roles = task.roles()
    temporal = temporal_layers(task, roles) if task.only is None else []
    metrics: dict[str, Json] = {}
    task.student.requires_grad_(False)
    if temporal:
        with bars("time embedding", options.iters) as progress:
            learner = PerStepLearner(task, nn.ModuleList(temporal), temporal, options)
            metrics["temporal_curve"] = curve(train_temporal(task, roles, learner, progress))

    def make(block: nn.Module) -> PerStepLearner:
        return PerStepLearner(task, block, untrained_layers(task, block, temporal), options)

    names = [info.name for info in task.trace.blocks] if task.only is None else task.only
    left = [n for n in names if untrained_layers(task, task.student.get_submodule(n), temporal)]
    with bars("blocks", options.iters * len(left)) as progress:
        return metrics | train_blocks(task, make, progress)


METHOD = Method(
    "per-step",
    "blocks, learned rounding, one step's scales at a time",
    PerStepOptions,
    train,
    lambda options, blocks: f"({blocks} + time embedding) x {options.iters}",
    by_blocks=True,
)

"""`adaround`: block reconstruction with learned rounding (BRECQ, arXiv 2102.05426).

Q-Diffusion (2302.04304), EDA-DM (2401.04585) and PTQ4DiT (2405.16005) use it for diffusion models. Each block, with its
input from the quantized prefix, learns the rounding of its weights and the scales of its activations. Biases and weight
scales stay fixed. No weight moves by more than one quantization step from the code below it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method
from dqtool.training.options import RoundingOptions

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


def train(task: DistillationTask, options: RoundingOptions, bars: Bars) -> dict[str, Json]:
    """Train the rounding and the activation scales of every block in execution order; return metrics."""
    from torch import nn

    from dqtool.training.block_loop import own_layers, train_blocks
    from dqtool.training.reconstruction import RoundingLearner

    task.merge_scaling()
    count = len(task.trace.blocks if task.only is None else task.only)
    with bars("blocks", options.iters * count) as progress:
        blocks = [task.student.get_submodule(info.name) for info in task.trace.blocks]

        def make(block: nn.Module) -> RoundingLearner:
            return RoundingLearner(task, block, own_layers(block, blocks), options)

        return train_blocks(task, make, progress)


METHOD = Method(
    "adaround",
    "blocks, learned rounding",
    RoundingOptions,
    train,
    lambda options, blocks: f"{blocks} x {options.iters}",
    by_blocks=True,
)

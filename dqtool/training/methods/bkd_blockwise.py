"""`bkd-blockwise`: `bkd` with a second pass that also goes block by block, so that memory stays that of one block.

The quantized model samples. On the points that it visits, each block in turn learns the float network's output, with
its input from the quantized prefix. `bkd` instead trains all blocks together on the prediction, with the memory of
end-to-end training.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method
from dqtool.training.options import FINE, Rates, without_second_pass

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


@dataclass(frozen=True)
class BlockwiseOptions:
    """Options of `bkd-blockwise`.

    Attributes:
        iters: iterations for each block on the recorded trajectory.
        refine_iters: iterations for each block on the student's own trajectory, of `refine_images` images.
        replay_batch: samples that run together where nothing learns; more would need more memory than learning does.
    """

    iters: int = 300
    batch_size: int = 32
    rates: Rates = field(default_factory=Rates)
    refine_iters: int = 150
    refine_rates: Rates = FINE
    refine_images: int = 128
    replay_batch: int = 32


def train(task: DistillationTask, options: BlockwiseOptions, bars: Bars) -> dict[str, Json]:
    """Train block by block on the recorded trajectory, then on the student's own; return metrics."""
    from torch import nn

    from dqtool.training.bkd import BkdLearner, distill_at_once
    from dqtool.training.block_loop import train_blocks
    from dqtool.training.on_policy import centre_weights, kept_trajectory

    task = replace(task, replay_batch=options.replay_batch, network_batch=task.network_batch or options.replay_batch)
    count = len(task.trace.blocks if task.only is None else task.only)
    metrics: dict[str, Json] = {}
    if options.iters and task.repair_iters is not None:
        metrics |= distill_at_once(task, options, bars)
    elif options.iters:

        def first(block: nn.Module) -> BkdLearner:
            return BkdLearner(task, block, options.rates, options.iters, options.batch_size)

        with bars("blocks", options.iters * count) as progress:
            metrics |= train_blocks(task, first, progress)
    task.merge_scaling()
    if options.refine_iters:
        centre_weights(task.student)
        own, _ = kept_trajectory(task, options.refine_images, 0, "trajectory of the second pass")
        there = replace(task, trajectory=own)

        def second(block: nn.Module) -> BkdLearner:
            return BkdLearner(there, block, options.refine_rates, options.refine_iters, options.batch_size)

        with bars("blocks, own trajectory", options.refine_iters * count) as progress:
            again = train_blocks(there, second, progress, "own ")
        metrics |= {f"refine_{name.removeprefix('loss_')}": value for name, value in again.items()}
    return metrics


METHOD = Method(
    "bkd-blockwise",
    "block by block, on the recorded and then on the model's own trajectory",
    BlockwiseOptions,
    train,
    lambda options, blocks: f"{blocks} x {options.iters} + {blocks} x {options.refine_iters}",
    by_blocks=True,
    at_once=True,
    derive=without_second_pass,
    corrects_predictions=True,
)

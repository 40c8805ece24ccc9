"""`bkd`, the default: Block-wise Knowledge Distillation, then one pass over all blocks on the student's own trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method
from dqtool.training.options import BkdOptions, without_second_pass

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


def train(task: DistillationTask, options: BkdOptions, bars: Bars) -> dict[str, Json]:
    """Train block by block, then all blocks together; return metrics."""
    from dqtool.training.bkd import distill_at_once, distill_blocks
    from dqtool.training.curve import curve, first_and_last
    from dqtool.training.on_policy import refine

    metrics: dict[str, Json] = {}
    if options.iters and task.repair_iters is not None:
        metrics |= distill_at_once(task, options, bars)
    elif options.iters:
        count = len(task.trace.blocks if task.only is None else task.only)
        with bars("blocks", options.iters * count) as progress:
            metrics |= distill_blocks(task, options, progress)
    task.merge_scaling()
    if options.refine_iters:
        with bars("all blocks", options.refine_iters) as progress:
            second = refine(task, options.second_pass(), progress)
        metrics |= {
            "refine_loss": first_and_last(second.losses, 100),
            "refine_curve": curve(second.losses),
            "refine_seconds": second.seconds,
            "refine_sampling_seconds": second.sampling_seconds,
        }
    return metrics


METHOD = Method(
    "bkd",
    "block by block, then all blocks on the model's own trajectory",
    BkdOptions,
    train,
    lambda options, blocks: f"{blocks} x {options.iters} + {options.refine_iters} over all blocks",
    by_blocks=True,
    at_once=True,
    derive=without_second_pass,
    corrects_predictions=True,
)

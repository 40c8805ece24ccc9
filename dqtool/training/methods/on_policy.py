"""`on-policy`: the whole network at once on its own trajectory, from the calibrated quantizers on.

End-to-end training sees the points that the float network visits; here it sees where its own errors lead, and is told
the float network's answer there. Blocks are computed again when their gradients are wanted. Of the calibration it takes
the quantizers' start and, where there are any, conditions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dqtool.training.methods import Method
from dqtool.training.options import OnPolicyOptions

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


def train(task: DistillationTask, options: OnPolicyOptions, bars: Bars) -> dict[str, Any]:
    """The pass over all blocks that ends `bkd`, alone, longer and at larger rates."""
    import torch

    from dqtool.training.curve import curve, first_and_last
    from dqtool.training.on_policy import refine

    task.merge_scaling()
    if not options.iters:
        return {}
    some = torch.linspace(0, len(task.trajectory) - 1, min(64, len(task.trajectory))).long()
    with torch.no_grad():
        size = float(task.predict(task.teacher, some).square().mean()) or 1.0
    with bars("own trajectory", options.iters) as progress:
        found = refine(task, options, progress)
    return {
        "network_loss": first_and_last(found["losses"], 100),
        "loss_curve": curve([loss / size for loss in found["losses"]]),
        "network_seconds": found["seconds"],
        "sampling_seconds": found["sampling_seconds"],
    }


METHOD = Method(
    "on-policy",
    "end to end, on the model's own trajectory",
    OnPolicyOptions,
    train,
    lambda options, _: f"{options.iters}",
    corrects=True,
)

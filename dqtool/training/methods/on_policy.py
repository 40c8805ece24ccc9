"""`on-policy`: end-to-end training on the student's own trajectory, from the calibrated quantizers on.

Other end-to-end methods see the points that the float network visits. Here the student sees the points that its own
errors lead to and learns the float network's prediction there. Blocks are recomputed in the backward pass. The method
uses only the initial quantizers and the conditions of the calibration.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json
from dqtool.training.methods import Method
from dqtool.training.options import OnPolicyOptions

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


def train(task: DistillationTask, options: OnPolicyOptions, bars: Bars) -> dict[str, Json]:
    """Train like the second pass of `bkd`, for longer and at higher rates; return metrics."""
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
        "network_loss": first_and_last(found.losses, 100),
        "loss_curve": curve([loss / size for loss in found.losses]),
        "network_seconds": found.seconds,
        "sampling_seconds": found.sampling_seconds,
    }


METHOD = Method(
    "on-policy",
    "end to end, on the model's own trajectory",
    OnPolicyOptions,
    train,
    lambda options, _: f"{options.iters}",
    corrects_predictions=True,
)

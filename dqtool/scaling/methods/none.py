"""No scaling: the reference of every comparison."""

from __future__ import annotations

import torch

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult

__all__ = ["METHOD", "none"]


def none(inputs: ScalingInput) -> ScalingResult:
    """Return ones."""
    return ScalingResult(torch.ones(inputs.channels, device=inputs.weights[0].device))


METHOD = ScalingMethod("none", none, keeps_range=True)

"""Weight Dilation (section 4.1 of arXiv 2409.14307): the largest factors that leave the ranges of the weights alone.

Three choices are dqtool's, since the paper does not say: factors are capped at 64, layers that share an input (q, k and v) share
one factor for each channel, and ranges of weights include zero, as their quantizers' grids do.
"""

from __future__ import annotations

import torch

from dqtool.core.dilation import weight_dilation
from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult

__all__ = ["METHOD", "wd"]


def wd(inputs: ScalingInput) -> ScalingResult:
    """Return the dilation of Eq. 20-21, from the weights alone; 1 for channels below the threshold (the paper has none)."""
    scale = weight_dilation(inputs.weights, inputs.groups, inputs.cap)
    return ScalingResult(torch.where(scale >= inputs.threshold, scale, torch.ones_like(scale)))


METHOD = ScalingMethod("wd", wd, keeps_range=True)

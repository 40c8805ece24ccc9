"""AWQ as the paper compares it: SmoothQuant's factors on the most salient channels only (App. H)."""

from __future__ import annotations

import math

import torch

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult
from dqtool.scaling.methods.smoothquant import smoothquant

__all__ = ["METHOD", "awq"]


def awq(inputs: ScalingInput, share: float = 0.01) -> ScalingResult:
    """Return SmoothQuant's factor on the `share` of channels (at least one) with the largest `a_k`, 1 elsewhere."""
    a = inputs.input_absmax()
    salient = a.argsort(descending=True, stable=True)[: max(1, math.floor(share * a.numel()))]
    scale = torch.ones_like(a)
    scale[salient] = smoothquant(inputs).scale[salient]
    return ScalingResult(scale)


METHOD = ScalingMethod("awq", awq, needs_statistics=True)

"""SmoothQuant (arXiv 2211.10438): balance the ranges of activations and weights."""

from __future__ import annotations

import torch

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult

__all__ = ["METHOD", "smoothquant"]


def smoothquant(inputs: ScalingInput, alpha: float = 0.5, floor: float = 1e-5) -> ScalingResult:
    """Return `a_k^α / w_k^(1-α)` (Eq. 4 there), at least `floor`, possibly below 1; 1 for dead channels."""
    a, w = inputs.input_absmax(), inputs.weight_absmax()
    scale = (a.pow(alpha) / w.clamp(min=floor).pow(1 - alpha)).clamp(min=floor)
    # A channel that is always zero, or that nothing reads, has no range to trade: the formula's 0 would multiply it by
    # 1 / floor the first time it isn't zero.
    return ScalingResult(torch.where((a == 0) | (w == 0), torch.ones_like(scale), scale))


METHOD = ScalingMethod("smoothquant", smoothquant, needs_statistics=True)

"""OmniQuant (arXiv 2308.13137): factors and shifts that `distill` learns; `dqtool/scaling/learning.py` trains them."""

from __future__ import annotations

from dataclasses import replace

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult
from dqtool.scaling.methods.smoothquant import smoothquant

__all__ = ["METHOD", "omniquant"]

LEARNING_RATE = 1e-5
"""Learning rate of OmniQuant in Table 14 of arXiv 2409.14307."""


def omniquant(inputs: ScalingInput) -> ScalingResult:
    """Return the start of the training (section 3.3 there): SmoothQuant's factors, around the channels' midpoints if the
    input can be shifted."""
    if not inputs.shiftable:
        return smoothquant(inputs)
    shift = inputs.midpoint()
    return replace(smoothquant(inputs.shifted(shift)), shift=shift)


METHOD = ScalingMethod(
    "omniquant", omniquant, needs_statistics=True, shifts=True, learning_rate=LEARNING_RATE, learns_shift=True
)

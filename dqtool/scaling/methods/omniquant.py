"""OmniQuant's learnable equivalent transformation: where its training starts. `dqtool/scaling/learning.py` trains it."""

from __future__ import annotations

from dataclasses import replace

from dqtool.scaling.methods.base import ScalingInput, ScalingResult, register
from dqtool.scaling.methods.closed_form import smoothquant
from dqtool.scaling.methods.searched import centred, middle

__all__ = ["omniquant"]

LEARNING_RATE = 1e-5
"""As in Table 14 of arXiv 2409.14307."""


@register("omniquant", needs_statistics=True, shifts=True, learning_rate=LEARNING_RATE, learns_shift=True)
def omniquant(inputs: ScalingInput) -> ScalingResult:
    """SmoothQuant's scale of the input that OS+' shift has centred (arXiv 2308.13137, section 3.3)."""
    if not inputs.shiftable:
        return smoothquant(inputs)
    shift = middle(inputs)
    return replace(smoothquant(centred(inputs, shift)), shift=shift)

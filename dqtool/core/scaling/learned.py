"""OmniQuant's learnable equivalent transformation: where its training starts. `nn/learned_scaling.py` trains it."""

from __future__ import annotations

from dataclasses import replace

from dqtool.core.scaling.base import ScalingInput, ScalingResult, register
from dqtool.core.scaling.closed_form import smoothquant
from dqtool.core.scaling.searched import middle

__all__ = ["omniquant"]

LEARNING_RATE = 1e-5
"""As in Table 14 of arXiv 2409.14307."""


@register("omniquant", needs_statistics=True, shifts=True, learning_rate=LEARNING_RATE)
def omniquant(inputs: ScalingInput) -> ScalingResult:
    """SmoothQuant's scale of the input that OS+' shift has centred (arXiv 2308.13137, section 3.3)."""
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    if not inputs.shiftable:
        return smoothquant(inputs)
    shift = middle(inputs)
    centred = replace(inputs, input_min=inputs.input_min - shift, input_max=inputs.input_max - shift)
    return replace(smoothquant(centred), shift=shift)

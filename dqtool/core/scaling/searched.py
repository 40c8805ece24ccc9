"""The scalings that quantize and look: Outlier Suppression+, and the best of several methods layer by layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dqtool.core.scaling.base import SCALINGS, ScalingInput, ScalingResult, register
from dqtool.core.scaling.output_error import OutputError

__all__ = ["auto", "middle", "osplus"]

THRESHOLDS = 16
"""Values of osplus' threshold that are tried, from the largest |x − z| down to a tenth of it."""

CANDIDATES = ("none", "wd", "smoothquant", "dgq", "awq")
"""What `auto` chooses from; the first of equals wins."""


def middle(inputs: ScalingInput) -> Tensor:
    """`(max + min) / 2` of every channel, `[C_in]`: what a shift moves to zero."""
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    return (inputs.input_max.detach().float() + inputs.input_min.detach().float()) / 2


@register("osplus", needs_statistics=True, needs_samples=True, shifts=True)
def osplus(inputs: ScalingInput) -> ScalingResult:
    """`z = (max + min)/2`, then `max(1, max|x − z| / τ)` with τ of the least output error (arXiv 2304.09145)."""
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    shift = middle(inputs) if inputs.shiftable else None
    if shift is not None:
        inputs = replace(inputs, input_min=inputs.input_min - shift, input_max=inputs.input_max - shift)
    reach = inputs.input_absmax()
    largest = float(reach.max())
    if largest == 0:
        return ScalingResult(torch.ones_like(reach), shift)
    if not bool(torch.isfinite(reach).all()):
        return ScalingResult(reach)  # for the caller's check to find
    error = OutputError(inputs)
    thresholds = torch.linspace(1.0, 0.1, THRESHOLDS).tolist()
    choices = [ScalingResult((reach / (largest * t)).clamp(min=1), shift) for t in thresholds]
    return min(choices, key=error)


@register("auto", needs_statistics=True, needs_samples=True)
def auto(inputs: ScalingInput) -> ScalingResult:
    """Of several methods the one with the least output error at the layer's bits."""
    error = OutputError(inputs)
    results = [replace(SCALINGS[name](inputs), method=name) for name in CANDIDATES]
    return min(results, key=error)

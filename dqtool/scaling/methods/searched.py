"""The scalings that quantize and look: Outlier Suppression+, and the best of several methods layer by layer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dqtool.scaling.methods.base import ScalingInput, ScalingResult, register
from dqtool.scaling.methods.closed_form import none, smoothquant, wd
from dqtool.scaling.methods.output_error import OutputError

__all__ = ["auto", "centred", "middle", "osplus"]

THRESHOLDS = 16
"""Values of osplus' threshold that are tried, from the largest |x − z| down to a tenth of it."""

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""SmoothQuant's α that `auto` tries: 1 makes all channels of the input as wide as each other, 0 those of the weight."""

LEARNING_RATE = 3e-3
"""Of `auto`'s log scales in training, an iteration."""


def middle(inputs: ScalingInput) -> Tensor:
    """`(max + min) / 2` of every channel, `[C_in]`: what a shift moves to zero."""
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    return (inputs.input_max.detach().float() + inputs.input_min.detach().float()) / 2


def centred(inputs: ScalingInput, shift: Tensor) -> ScalingInput:
    """The input moved by `-shift`."""
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    return replace(inputs, input_min=inputs.input_min - shift, input_max=inputs.input_max - shift)


@register("osplus", needs_statistics=True, needs_samples=True, shifts=True)
def osplus(inputs: ScalingInput) -> ScalingResult:
    """`z = (max + min)/2`, then `max(1, max|x − z| / τ)` with τ of the least output error (arXiv 2304.09145)."""
    assert inputs.input_min is not None
    assert inputs.input_max is not None
    shift = middle(inputs) if inputs.shiftable else None
    if shift is not None:
        inputs = centred(inputs, shift)
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


@register("auto", needs_statistics=True, needs_samples=True, shifts=True, learning_rate=LEARNING_RATE)
def auto(inputs: ScalingInput) -> ScalingResult:
    """Of no scaling, Weight Dilation and SmoothQuant of several strengths, and where the input can be moved the first and the
    last of them around the channels' middles as well, the one with the least output error at the layer's bits; the first
    of equals. Training moves the scale on."""
    results = [replace(method(inputs), method=method.__name__) for method in (none, wd)]
    results += [replace(smoothquant(inputs, alpha), method="smoothquant") for alpha in STRENGTHS]
    if inputs.shiftable:
        shift = middle(inputs)
        moved = centred(inputs, shift)
        results.append(replace(none(moved), shift=shift, method="none"))
        results += [replace(smoothquant(moved, alpha), shift=shift, method="smoothquant") for alpha in STRENGTHS]
    wrong = [result for result in results if not bool(torch.isfinite(result.scale).all())]
    return wrong[0] if wrong else min(results, key=OutputError(inputs))  # the caller's check finds it

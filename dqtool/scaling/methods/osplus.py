"""Outlier Suppression+ (arXiv 2304.09145): centre the channels, then shrink those that reach past a searched threshold."""

from __future__ import annotations

import torch

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult
from dqtool.scaling.methods.output_error import OutputError

__all__ = ["METHOD", "osplus"]

THRESHOLDS = 16
"""Thresholds that are tried, from the largest |x − z| down to a tenth of it."""


def osplus(inputs: ScalingInput) -> ScalingResult:
    """Return the shift `z = (max + min)/2` and `max(1, max|x − z| / τ)` with τ of the least output error."""
    shift = inputs.midpoint() if inputs.shiftable else None
    if shift is not None:
        inputs = inputs.shifted(shift)
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


METHOD = ScalingMethod("osplus", osplus, needs_statistics=True, needs_samples=True, shifts=True)

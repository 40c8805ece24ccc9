"""DGQ as the paper compares it: shrink outlying channels only (App. H)."""

from __future__ import annotations

import torch

from dqtool.scaling.methods.base import ScalingInput, ScalingMethod, ScalingResult

__all__ = ["METHOD", "dgq"]


def dgq(inputs: ScalingInput, quantile: float = 0.995) -> ScalingResult:
    """Return `max(1, a_k / τ)` with τ the 99.5th percentile of `{a_k}`."""
    a = inputs.input_absmax()
    threshold = torch.quantile(a.double(), quantile).float()
    # All channels zero: nothing to scale. NaN statistics pass through, for the caller's check to find.
    return ScalingResult((a / threshold).clamp(min=1) if threshold != 0 else torch.ones_like(a))


METHOD = ScalingMethod("dgq", dgq, needs_statistics=True)

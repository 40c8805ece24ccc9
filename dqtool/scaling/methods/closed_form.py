"""The scalings that are one formula: of the weights alone, or of ranges pooled over all steps (Table 14, App. H)."""

from __future__ import annotations

import math

import torch

from dqtool.core.dilation import weight_dilation
from dqtool.scaling.methods.base import ScalingInput, ScalingResult, register

__all__ = ["awq", "dgq", "none", "smoothquant", "wd"]


@register("wd", keeps_range=True)
def wd(inputs: ScalingInput) -> ScalingResult:
    """Weight Dilation (section 4.1 of the paper): weights only. A channel counts as unsaturated when it can grow by the
    threshold, in the paper by anything."""
    scale = weight_dilation(inputs.weights, inputs.groups, inputs.cap, inputs.slacks)
    return ScalingResult(torch.where(scale >= inputs.threshold, scale, torch.ones_like(scale)))


@register("none", keeps_range=True)
def none(inputs: ScalingInput) -> ScalingResult:
    """No scaling: all ones."""
    return ScalingResult(torch.ones(inputs.channels, device=inputs.weights[0].device))


@register("smoothquant", needs_statistics=True)
def smoothquant(inputs: ScalingInput, alpha: float = 0.5, floor: float = 1e-5) -> ScalingResult:
    """`a_k^α / w_k^(1-α)`, at least 1e-5, possibly below 1 (arXiv 2211.10438, Eq. 4); 1 for dead channels."""
    a, w = inputs.input_absmax(), inputs.weight_absmax()
    scale = (a.pow(alpha) / w.clamp(min=floor).pow(1 - alpha)).clamp(min=floor)
    # A channel that is always zero, or that nothing reads, has no range to trade: the formula's 0 would blow it up by
    # 1 / floor the first time it isn't zero.
    return ScalingResult(torch.where((a == 0) | (w == 0), torch.ones_like(scale), scale))


@register("awq", needs_statistics=True)
def awq(inputs: ScalingInput, share: float = 0.01) -> ScalingResult:
    """SmoothQuant's scale on the 1 % of channels (at least one) with the largest `a_k`, 1 elsewhere (App. H)."""
    a = inputs.input_absmax()
    salient = a.argsort(descending=True, stable=True)[: max(1, math.floor(share * a.numel()))]
    scale = torch.ones_like(a)
    scale[salient] = smoothquant(inputs).scale[salient]
    return ScalingResult(scale)


@register("dgq", needs_statistics=True)
def dgq(inputs: ScalingInput, quantile: float = 0.995) -> ScalingResult:
    """`max(1, a_k / τ)` with τ the 99.5th percentile of `{a_k}`: only outlying channels are scaled (App. H)."""
    a = inputs.input_absmax()
    threshold = torch.quantile(a.double(), quantile).float()
    # All channels zero: nothing to scale. NaN statistics pass through, for the caller's check to find.
    return ScalingResult((a / threshold).clamp(min=1) if threshold != 0 else torch.ones_like(a))

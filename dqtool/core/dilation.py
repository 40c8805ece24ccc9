"""Weight Dilation: the largest scale per in-channel that keeps every out-channel's weight range unchanged.

Implements Eq. 17-21 and Algorithm 1 of arXiv 2409.14307. Ranges include zero, as the quantizer's do, so that rows of
one sign need no special case. All results are float32 and exact: the ranges before and after dilation are equal bit for
bit.

Weights are `[C_out, C_in / groups, *kernel]`. `s` is `[C_in]`; its entry `g * C_in / groups + k` belongs to column `k`
of the out-channels of group `g`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dqtool.errors import NumericError, UsageError

__all__ = ["CAP", "broadcast_scale", "dilate_weight", "in_channels", "weight_dilation", "weight_ranges"]

CAP = 64.0
"""Largest scale of an in-channel, by default."""
_CACHED = 1 << 19
"""Weights processed at once, chosen to fit into the cache."""


def weight_ranges(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return `lo = min(0, min W)` and `hi = max(0, max W)` of each out-channel, both `[C_out]`.

    Raises:
        NumericError: the weight holds NaN or Inf.
    """
    rows = weight.flatten(1)
    lo, hi = rows.amin(dim=1), rows.amax(dim=1)  # 10 times faster than aminmax, which is not vectorised
    # A NaN or infinity in a row always makes a bound of that row non-finite.
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericError(
            f"A weight of shape {tuple(weight.shape)} holds {bad} values that are NaN or infinite.",
            fix="Repair the model: a weight with such a range can't be scaled or quantized.",
        )
    return lo.clamp(max=0), hi.clamp(min=0)


def weight_dilation(
    weights: Tensor | Sequence[Tensor],
    groups: int = 1,
    cap: float = CAP,
) -> Tensor:
    """Return the dilation `s [C_in]`, float32 in [1, cap], of one weight or of several weights that read one input (Eq.
    20-21).

    Weights that share an input (q, k, v) get the minimum of their dilations. A channel that holds the bound of some
    out-channel gets exactly 1, and so does a channel whose weights are all zero.

    Raises:
        UsageError: the shapes don't fit together, or the cap is below 1.
        NumericError: a weight holds NaN or Inf.
    """
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if not weights or len({in_channels(weight, groups) for weight in weights}) != 1:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights) or "none"
        raise UsageError(f"Weights that share one dilation must have the same in-channels, got {shapes}.")
    if not cap >= 1 or math.isinf(cap):
        raise UsageError(f"The cap of the dilation must be finite and at least 1, got {cap}.", where="--cap")
    s = torch.stack([_channel_slack(weight, groups) for weight in weights]).amin(dim=0)
    # A channel whose weights are all zero has no bound to reach. Scaling it would change its activations' range only.
    return torch.where(torch.isinf(s), torch.ones_like(s), s).clamp(1, cap)


def _channel_slack(weight: Tensor, groups: int = 1) -> Tensor:
    """Return `min r[j,k,u]` of each in-channel, `[C_in]`: the factor by which the channel can grow, +inf if its weights
    are zero.

    Raises:
        UsageError: the shape is not that of a weight.
        NumericError: the weight holds NaN or Inf.
    """
    weight = weight.detach().float()
    width = in_channels(weight, groups) // groups
    every = [_group_slack(rows.flatten(1)).view(width, -1) for rows in weight.chunk(groups)]
    slack = torch.cat(every).amin(dim=1)
    if bool(torch.isinf(slack).any()):
        # The ratio of a denormal weight overflows to infinity; the channel is not zero, so the cap is its answer.
        largest = [rows.abs().reshape(len(rows), width, -1).amax(dim=(0, 2)) for rows in weight.chunk(groups)]
        slack = torch.where(torch.cat(largest) > 0, slack.clamp(max=torch.finfo(slack.dtype).max), slack)
    return slack


def dilate_weight(weight: Tensor, s: Tensor, groups: int = 1) -> Tensor:
    """Return the dilated weight `W' = clip(s_k · W, lo_j, hi_j)` in float32, with the shape of `weight` (Eq. 19).

    `s` must come from `weight_dilation`. The clip corrects rounding only: a product may exceed the bound by one ulp
    (one ulp below the bound is harmless). Other scaling methods change ranges and use `scaling.methods.scale_weight`.
    Rows of a group are independent, so any subset of them may be dilated separately.
    """
    weight = weight.detach().float()
    width = in_channels(weight, groups) // groups
    if s.shape != (width * groups,):
        raise _misfit(s, weight, groups)
    # One factor for each entry of a row: the few entries of a kernel are too short to be multiplied fast.
    factors = s.float().view(groups, width, 1).expand(-1, -1, weight[0, 0].numel()).reshape(groups, -1)
    dilated = torch.empty(weight.shape, device=weight.device)
    for factor, old, new in zip(factors, weight.chunk(groups), dilated.chunk(groups), strict=True):
        for part in _parts(old):
            rows, into = old[part].flatten(1), new[part].flatten(1)
            lo, hi = (bound[:, None] for bound in weight_ranges(rows))
            torch.minimum(torch.maximum(torch.mul(rows, factor, out=into), lo, out=into), hi, out=into)
    return dilated


def in_channels(weight: Tensor, groups: int) -> int:
    """Return the number of in-channels of a linear or convolution weight.

    Raises:
        UsageError: the weight's shape does not fit this number of groups.
    """
    if weight.ndim < 2 or weight.numel() == 0 or groups < 1 or weight.shape[0] % groups:
        raise UsageError(
            f"A weight must be [C_out, C_in / groups, ...] with C_out divisible by groups, got {tuple(weight.shape)} "
            f"and {groups} groups."
        )
    return weight.shape[1] * groups


def broadcast_scale(s: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return `s [C_in]` in the layout `[C_out, C_in / groups, 1, ...]` that multiplies `weight`.

    Raises:
        UsageError: the lengths do not fit.
    """
    if s.shape != (in_channels(weight, groups),):
        raise _misfit(s, weight, groups)
    per_row = s.to(weight.dtype).view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return per_row.view(*per_row.shape, *[1] * (weight.ndim - 2))


def _misfit(s: Tensor, weight: Tensor, groups: int) -> UsageError:
    """Build the error for a scale that does not fit a weight."""
    return UsageError(f"A scale of shape {tuple(s.shape)} doesn't fit a weight {tuple(weight.shape)}, groups {groups}.")


def _group_slack(rows: Tensor) -> Tensor:
    """Return the smallest ratio `r` over the rows `[C_out, n]` of one group, `[n]`; +inf for entries that are zero in
    every row."""
    slack = rows.new_full((rows.shape[1],), math.inf)
    for part in _parts(rows):
        some = rows[part]
        lo, hi = (bound[:, None] for bound in weight_ranges(some))
        # Divide the bound of the weight's own sign by the weight: x / x is exactly 1, so saturated channels are exact.
        # The other bound gives a negative ratio. A zero weight does not limit its channel: one of its ratios is +inf,
        # provided that a bound of zero, which limits no weight, is replaced by 1 or -1.
        upper, lower = torch.where(hi > 0, hi, 1.0), torch.where(lo < 0, lo, -1.0)
        ratio = upper / some
        torch.maximum(ratio, lower / some, out=ratio)
        torch.minimum(slack, ratio.amin(dim=0), out=slack)
    return slack


def _parts(weight: Tensor) -> list[slice]:
    """Return row ranges that are small enough to stay in a core's cache during several passes."""
    rows = max(1, _CACHED // max(1, weight[0].numel()))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]

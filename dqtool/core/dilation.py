"""Weight Dilation: the largest scale per in-channel that leaves every out-channel's range alone.

Eq. 17-21 and Algorithm 1 of arXiv 2409.14307, with ranges that include zero (as the quantizer's do), so that one-signed
rows need no special case. Everything is float32 and exact: ranges before and after are equal bitwise.

Weights are `[C_out, C_in / groups, *kernel]`; `s` is `[C_in]`, and its entry `g * C_in / groups + k` belongs to
column `k` of the out-channels of group `g`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dqtool.errors import NumericError, UsageError

__all__ = ["CAP", "broadcast_scale", "dilate_weight", "in_channels", "weight_dilation", "weight_ranges"]

CAP = 64.0
_CACHED = 1 << 19
"""Weights worked on at once."""


def weight_ranges(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`lo = min(0, min W)` and `hi = max(0, max W)` per out-channel, each `[C_out]`.

    Raises `NumericError` if the weight holds NaN or Inf.
    """
    rows = weight.flatten(1)
    lo, hi = rows.amin(dim=1), rows.amax(dim=1)  # 10 times faster than aminmax, which isn't vectorised
    # NaN and infinity always show in the bounds of their row.
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise NumericError(
            f"A weight of shape {tuple(weight.shape)} holds {bad} values that are NaN or infinite.",
            fix="Repair the model: nothing can be scaled or quantized by such a range.",
        )
    return lo.clamp(max=0), hi.clamp(min=0)


def weight_dilation(
    weights: Tensor | Sequence[Tensor],
    groups: int = 1,
    cap: float = CAP,
) -> Tensor:
    """The dilation `s [C_in]` (float32, in [1, cap]) of one weight, or of several that read the same input (Eq. 20-21).

    Weights that share an input (q, k, v) get the minimum over them. Channels that hold some out-channel's bound, and
    channels no weight of which is non-zero, get exactly 1.

    Raises `UsageError` for shapes that don't fit together or a cap below 1, `NumericError` for NaN or Inf.
    """
    weights = [weights] if isinstance(weights, Tensor) else list(weights)
    if not weights or len({in_channels(weight, groups) for weight in weights}) != 1:
        shapes = ", ".join(str(tuple(weight.shape)) for weight in weights) or "none"
        raise UsageError(f"Weights that share one dilation must have the same in-channels, got {shapes}.")
    if not cap >= 1 or math.isinf(cap):
        raise UsageError(f"The cap of the dilation must be finite and at least 1, got {cap}.", where="--cap")
    s = torch.stack([_channel_slack(weight, groups) for weight in weights]).amin(dim=0)
    # A channel without weights has no bound to reach: stretching its activations would change nothing but their range.
    return torch.where(torch.isinf(s), torch.ones_like(s), s).clamp(1, cap)


def _channel_slack(weight: Tensor, groups: int = 1) -> Tensor:
    """Return `min r[j,k,u]` per in-channel, `[C_in]`: the factor by which it can grow; +inf if all its weights are zero.

    Raises `UsageError` for a shape that is no weight's, `NumericError` for NaN or Inf.
    """
    weight = weight.detach().float()
    width = in_channels(weight, groups) // groups
    every = [_group_slack(rows.flatten(1)).view(width, -1) for rows in weight.chunk(groups)]
    slack = torch.cat(every).amin(dim=1)
    if bool(torch.isinf(slack).any()):
        # Infinite over a denormal is not dead, and its answer is the cap.
        largest = [rows.abs().reshape(len(rows), width, -1).amax(dim=(0, 2)) for rows in weight.chunk(groups)]
        slack = torch.where(torch.cat(largest) > 0, slack.clamp(max=torch.finfo(slack.dtype).max), slack)
    return slack


def dilate_weight(weight: Tensor, s: Tensor, groups: int = 1) -> Tensor:
    """`W' = clip(s_k · W, lo_j, hi_j)` in float32, of the weight's shape (Eq. 19).

    `s` must come from `weight_dilation`. The clip undoes rounding only: a product may land one ulp past the bound (or
    one short of it, which is harmless). Other scaling methods change ranges and use `scaling.methods.scale_weight`.
    The rows of a group are independent: any run of them may be dilated separately.
    """
    weight = weight.detach().float()
    width = in_channels(weight, groups) // groups
    if s.shape != (width * groups,):
        raise _misfit(s, weight, groups)
    # One factor for each entry of a row, since a kernel's few entries are too short a run to be multiplied fast.
    factors = s.float().view(groups, width, 1).expand(-1, -1, weight[0, 0].numel()).reshape(groups, -1)
    dilated = torch.empty(weight.shape, device=weight.device)
    for factor, old, new in zip(factors, weight.chunk(groups), dilated.chunk(groups), strict=True):
        for part in _parts(old):
            rows, into = old[part].flatten(1), new[part].flatten(1)
            lo, hi = (bound[:, None] for bound in weight_ranges(rows))
            torch.minimum(torch.maximum(torch.mul(rows, factor, out=into), lo, out=into), hi, out=into)
    return dilated


def in_channels(weight: Tensor, groups: int) -> int:
    """In-channels of a linear or convolution weight; raises `UsageError` if it can't belong to `groups` groups."""
    if weight.ndim < 2 or weight.numel() == 0 or groups < 1 or weight.shape[0] % groups:
        raise UsageError(
            f"A weight must be [C_out, C_in / groups, ...] with C_out divisible by groups, got {tuple(weight.shape)} "
            f"and {groups} groups."
        )
    return weight.shape[1] * groups


def broadcast_scale(s: Tensor, weight: Tensor, groups: int) -> Tensor:
    """`s [C_in]` laid out to multiply `weight`: `[C_out, C_in / groups, 1, ...]`. Raises `UsageError` on a misfit."""
    if s.shape != (in_channels(weight, groups),):
        raise _misfit(s, weight, groups)
    per_row = s.to(weight.dtype).view(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return per_row.view(*per_row.shape, *[1] * (weight.ndim - 2))


def _misfit(s: Tensor, weight: Tensor, groups: int) -> UsageError:
    return UsageError(f"A scale of shape {tuple(s.shape)} doesn't fit a weight {tuple(weight.shape)}, groups {groups}.")


def _group_slack(rows: Tensor) -> Tensor:
    """`min r` over the rows `[C_out, n]` of one group, for each of their n entries; +inf where all are zero."""
    slack = rows.new_full((rows.shape[1],), math.inf)
    for part in _parts(rows):
        some = rows[part]
        lo, hi = (bound[:, None] for bound in weight_ranges(some))
        # The bound of a weight's own sign, divided by the weight: x / x is exactly 1, so saturated channels are exact.
        # The other bound gives a negative ratio. Zero weights don't restrain: one of their two ratios is +inf, if
        # bounds that are zero themselves, which no weight needs, are put at a distance.
        upper, lower = torch.where(hi > 0, hi, 1.0), torch.where(lo < 0, lo, -1.0)
        ratio = upper / some
        torch.maximum(ratio, lower / some, out=ratio)
        torch.minimum(slack, ratio.amin(dim=0), out=slack)
    return slack


def _parts(weight: Tensor) -> list[slice]:
    """Runs of rows that stay in a core's cache through several passes."""
    rows = max(1, _CACHED // max(1, weight[0].numel()))
    return [slice(start, start + rows) for start in range(0, len(weight), rows)]

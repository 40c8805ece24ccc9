"""Split of a quantizer's error into clipping (values outside its range) and rounding (values between its levels).

The split is exact: a value outside `[scale * (low - z), scale * (Q - z)]` has a clipping error only, and every other
value has a rounding error only. Appendix F of arXiv 2409.14307 compares methods by the two shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.core.affine import fake_quantize, levels

__all__ = ["error_parts", "histogram_error"]

POINTS = 4
"""Points that represent one bin. At 8 bits a bin is about half a level wide, so the rounding error depends on the
position inside the bin and its centre alone would misjudge it."""


def error_parts(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0) -> tuple[Tensor, Tensor]:
    """Return the squared error of each value of `x` as (clipping, rounding); one of the two is 0 for every value.

    `scale` and `zero_point` broadcast against `x`. The two parts sum to `(fake_quantize(x) - x)²`.
    """
    zero = zero_point.round()
    squared = (fake_quantize(x, scale, zero_point, bits, low) - x).square()
    clipped = (x < scale * (low - zero)) | (x > scale * (levels(bits) - zero))
    nothing = torch.zeros_like(squared)
    return torch.where(clipped, squared, nothing), torch.where(clipped, nothing, squared)


def histogram_error(
    histogram: Tensor, lo: Tensor, hi: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the squared clipping error, the squared rounding error and the sum of squares of histogrammed values, each
    `[R]`.

    Args:
        histogram: counts `[R, B]` of `B` equal bins over `[lo, hi]`, for `R` independent quantizers.
        lo: lower end of each histogram, `[R]`, as are `hi`, `scale` and `zero_point`.
    """
    bins = histogram.shape[1]
    width = (hi - lo) / bins
    places = (torch.arange(bins * POINTS, device=histogram.device) + 0.5) / POINTS
    values = lo[:, None] + places * width[:, None]  # [R, B * POINTS]
    counts = histogram.to(values.dtype).repeat_interleave(POINTS, 1) / POINTS
    clipping, rounding = error_parts(values, scale[:, None], zero_point[:, None], bits, low)
    return (clipping * counts).sum(1), (rounding * counts).sum(1), (values.square() * counts).sum(1)

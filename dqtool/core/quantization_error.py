"""What a quantizer gets wrong, and why: values beyond its range (clipping) or between its levels (rounding).

The split is exact: a value outside `[scale * (low - z), scale * (Q - z)]` is clipped to a level and has no rounding error,
every other one has nothing but that. Appendix F of arXiv 2409.14307 compares methods by the two shares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.core.affine import fake_quantize, levels

__all__ = ["error_parts", "histogram_error"]

POINTS = 4
"""Points that stand for a bin: at 8 bits a bin is about half a level wide, and its centre alone would miss a rounding error
that depends on where in the bin a value lies."""


def error_parts(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0) -> tuple[Tensor, Tensor]:
    """Squared error of each value of `x`, as (clipping, rounding): one of the two is 0 everywhere.

    `scale` and `zero_point` broadcast against `x`; their sum is `(fake_quantize(x) - x)²`.
    """
    zero = zero_point.round()
    squared = (fake_quantize(x, scale, zero_point, bits, low) - x).square()
    clipped = (x < scale * (low - zero)) | (x > scale * (levels(bits) - zero))
    nothing = torch.zeros_like(squared)
    return torch.where(clipped, squared, nothing), torch.where(clipped, nothing, squared)


def histogram_error(
    histogram: Tensor, lo: Tensor, hi: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of histogrammed values: squared error by clipping, by rounding, and the values' own sum of squares, each `[R]`.

    `histogram` is `[R, B]`, counts of `B` equal bins over `[lo, hi]` of `R` independent quantizers; the rest is `[R]`.
    """
    bins = histogram.shape[1]
    width = (hi - lo) / bins
    places = (torch.arange(bins * POINTS, device=histogram.device) + 0.5) / POINTS
    values = lo[:, None] + places * width[:, None]  # [R, B * POINTS]
    counts = histogram.to(values.dtype).repeat_interleave(POINTS, 1) / POINTS
    clipping, rounding = error_parts(values, scale[:, None], zero_point[:, None], bits, low)
    return (clipping * counts).sum(1), (rounding * counts).sum(1), (values.square() * counts).sum(1)

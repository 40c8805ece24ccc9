"""The uniform affine quantizer (Eq. 1-4 of arXiv 2409.14307): ranges, codes, gradients, and how its range is chosen.

Everything here works on *centred* codes `c = clip(round(x * m), low - z, Q - z)`, the stored code minus its zero
point, because that is what integer kernels multiply: `y = scale * c`. `m = 1 / (divisor * scale)` is computed once in
float32 and multiplied with, never divided by, so that every implementation rounds alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "FakeQuantize",
    "affine_parameters",
    "centred_codes",
    "fake_quantize",
    "levels",
    "lowest_code",
    "search_histogram",
    "search_weight",
]

SYMMETRIC_BITS = 8
"""Width at which weights and attention operands use a symmetric grid: `z = 128`, codes 1..255."""


def levels(bits: int) -> int:
    """Largest code `Q = 2^bits - 1`."""
    return 2**bits - 1


def lowest_code(bits: int, symmetric: bool) -> int:
    """Smallest code in use: 1 on the symmetric grid (so that it is centred), else 0."""
    return 1 if symmetric and bits == SYMMETRIC_BITS else 0


def affine_parameters(lo: Tensor, hi: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the grid that covers `[lo, hi]` and zero (section 1).

    `lo`, `hi` have any common shape; so have the results (zero points are integers held in float32). A degenerate
    range gives scale 1 and zero point 0 (`2^(bits-1)` on the symmetric grid), never 0, NaN or Inf.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    if symmetric:
        centre = 2 ** (bits - 1)
        scale = torch.maximum(-lo, hi) / (centre - 1)
        scale = torch.where(scale > torch.finfo(scale.dtype).tiny, scale, torch.ones_like(scale))
        return scale, torch.full_like(scale, centre)
    scale = (hi - lo) / levels(bits)
    valid = scale > torch.finfo(scale.dtype).tiny
    scale = torch.where(valid, scale, torch.ones_like(scale))
    zero_point = torch.where(valid, (-lo / scale).round().clamp(0, levels(bits)), torch.zeros_like(scale))
    return scale, zero_point


def centred_codes(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0, divisor: Tensor | None = None
) -> Tensor:
    """Centred integer codes of `x`, held in `x`'s dtype. `scale`, `zero_point`, `divisor` broadcast against `x`."""
    return _codes(x * _multiplier(scale, divisor), zero_point, bits, low)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0, divisor: Tensor | None = None
) -> Tensor:
    """`scale * centred_codes(x)`: what an integer kernel computes with, in float. Differentiable in all tensors.

    With a `divisor` s (Weight Dilation) the result is the quantized `x / s`; the division costs nothing because it is
    part of the multiplier, also where s is learned. The gradient is straight-through for `round`, exact in `scale` through it (LSQ), and
    `zero_point` is a float rounded with a straight-through gradient.
    """
    learns = x.requires_grad or scale.requires_grad or zero_point.requires_grad
    if torch.is_grad_enabled() and (learns or (divisor is not None and divisor.requires_grad)):
        return FakeQuantize.apply(x, scale, zero_point, bits, low, divisor)
    codes = x * _multiplier(scale, divisor)
    return _codes(codes, zero_point, bits, low).mul_(scale)


class FakeQuantize(torch.autograd.Function):
    """The gradients of `fake_quantize`, fused: few passes over memory, two saved tensors. One is the result, which whatever
    multiplies it keeps as well; codes are whole numbers, so that dividing it by the scale gives them back exactly."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int, divisor: Tensor | None
    ) -> Tensor:
        scaled = x * _multiplier(scale, divisor)
        result = _clip(scaled.round(), zero_point, bits, low).mul_(scale)
        ctx.save_for_backward(scaled, result, scale, divisor)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        scaled, result, scale, divisor = ctx.saved_tensors
        codes = (result * scale.reciprocal()).round_()
        grad_x = grad_scale = grad_zero = grad_divisor = None
        # In place, since memory is what this costs: |error| <= 1/2 where the code was not clipped.
        inside = (scaled - codes).abs_().le_(0.5).mul_(grad)
        if ctx.needs_input_grad[1]:
            # d/d scale = code - x/(divisor*scale) inside the range, the clipped code outside.
            grad_scale = _dot_to(grad, codes, scale.shape) - _dot_to(inside, scaled, scale.shape)
        if ctx.needs_input_grad[2]:
            grad_zero = (inside.sum_to_size(scale.shape) - grad.sum_to_size(scale.shape)) * scale
        if ctx.needs_input_grad[5]:
            grad_divisor = (inside * scaled).mul_(scale).sum_to_size(divisor.shape) / -divisor
        if ctx.needs_input_grad[0]:
            grad_x = inside if divisor is None else inside.mul_(divisor.reciprocal())
        return grad_x, grad_scale, grad_zero, None, None, grad_divisor


def search_weight(
    weight: Tensor, bits: int, symmetric: bool, candidates: int = 80, smallest: float = 0.2
) -> tuple[Tensor, Tensor]:
    """Per-out-channel scale and zero point with the least squared error over shrink factors of the range.

    `weight` is `[C_out, ...]`; returns two `[C_out]` tensors. The factors run from 1 down to `smallest`.
    """
    rows = weight.detach().flatten(1)
    lo, hi = rows.amin(1), rows.amax(1)
    factors = torch.linspace(1.0, smallest, candidates).tolist()
    lows, highs = (torch.stack([end * factor for factor in factors]) for end in (lo, hi))
    _, _, scale, zero_point = _least_error(rows, None, lows, highs, bits, symmetric)
    return scale, zero_point


def search_histogram(
    histogram: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool = False, candidates: int = 60
) -> tuple[Tensor, Tensor]:
    """Scale and zero point with the least squared error on histogrammed activations.

    `histogram` is `[R, B]`: counts of `B` equal bins over `[lo, hi]` for each of `R` independent quantizers (steps, or
    steps x heads); `lo`, `hi` are `[R]`. Both ends of the range shrink independently (a coarse grid) and then together
    (a fine one), since activations after SiLU have one short and one long tail. Returns two `[R]` tensors.
    """
    bins = histogram.shape[1]
    width = (hi - lo) / bins
    centres = lo[:, None] + (torch.arange(bins) + 0.5) * width[:, None]  # [R, B]
    counts = histogram.to(centres.dtype)
    coarse = torch.linspace(1.0, 0.1, max(2, int(candidates**0.5) + 2))
    pairs = torch.cartesian_prod(coarse, coarse) if not symmetric else torch.stack([coarse, coarse], 1)
    above, below = pairs.to(lo).unbind(1)  # [K]
    lows, highs = lo * below[:, None], hi * above[:, None]
    error, chosen, scale, zero_point = _least_error(centres, counts, lows, highs, bits, symmetric)
    factors = torch.linspace(1.15, 0.85, candidates).to(lo)[:, None]
    lows, highs = (end * (part[chosen] * factors).clamp(max=1) for end, part in ((lo, below), (hi, above)))
    fine_error, _, fine_scale, fine_zero_point = _least_error(centres, counts, lows, highs, bits, symmetric)
    better = fine_error < error
    return torch.where(better, fine_scale, scale), torch.where(better, fine_zero_point, zero_point)


AT_ONCE = 2**17
"""Values that candidates are tried on in one go: small quantizers take few operations, large ones no more memory."""


def _least_error(
    values: Tensor, counts: Tensor | None, lo: Tensor, hi: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of K candidate ranges `lo`, `hi` `[K, R]`, for each row of `values` `[R, B]` (`counts` `[R, B]` times each) the first
    with the least squared error: that error, which one it is, its scale and its zero point, all `[R]`."""
    scales, zero_points = affine_parameters(lo, hi, bits, symmetric)
    low, n = lowest_code(bits, symmetric), max(1, AT_ONCE // max(1, values.numel()))
    errors = []
    for scale, zero_point in zip(scales.split(n), zero_points.split(n), strict=True):
        error = (fake_quantize(values, scale[..., None], zero_point[..., None], bits, low) - values).square_()
        errors.append((error if counts is None else error.mul_(counts)).sum(-1))
    error, chosen = torch.cat(errors).nan_to_num_(nan=torch.inf, posinf=torch.inf).min(0)
    row = torch.arange(len(chosen), device=chosen.device)
    return error, chosen, scales[chosen, row], zero_points[chosen, row]


def _multiplier(scale: Tensor, divisor: Tensor | None) -> Tensor:
    return (scale if divisor is None else scale * divisor).reciprocal()


def _codes(scaled: Tensor, zero_point: Tensor, bits: int, low: int) -> Tensor:
    """Round and clip `scaled` in place."""
    return _clip(scaled.round_(), zero_point, bits, low)


def _clip(rounded: Tensor, zero_point: Tensor, bits: int, low: int) -> Tensor:
    """Clip to the centred codes that exist, in place. Two binary operations: `clamp` with tensor bounds is not vectorised."""
    zero = zero_point.round()
    if torch.compiler.is_compiling():  # graphs have no `out`, and fuse the two
        return rounded.maximum(low - zero).minimum(levels(bits) - zero)
    torch.maximum(rounded, low - zero, out=rounded)
    return torch.minimum(rounded, levels(bits) - zero, out=rounded)


def _dot_to(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """`(a * b).sum_to_size(shape)` without the product in memory where `shape` keeps only leading dimensions."""
    kept = next((i for i, n in enumerate(shape) if n == 1), len(shape))
    if all(n == 1 for n in shape[kept:]) and tuple(shape[:kept]) == tuple(a.shape[:kept]) and kept < a.dim():
        return torch.linalg.vecdot(a.flatten(kept), b.flatten(kept)).view(shape)
    return (a * b).sum_to_size(shape)

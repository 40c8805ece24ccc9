"""Uniform affine quantizer (Eq. 1-4 of arXiv 2409.14307): parameters, codes, gradients and the search for its range.

All functions use *centred* codes `c = clip(round(x * m), low - z, Q - z)`, the stored code minus its zero point,
because integer kernels multiply these: `y = scale * c`. The multiplier `m = 1 / (divisor * scale)` is computed once in
float32. Inputs are multiplied by it and never divided, so that every implementation rounds alike.
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
    """Return the largest code `Q = 2^bits - 1`."""
    return (1 << bits) - 1


def lowest_code(bits: int, symmetric: bool) -> int:
    """Return the smallest code in use: 1 on the symmetric 8-bit grid, so that the grid is centred, and 0 otherwise."""
    return 1 if symmetric and bits == SYMMETRIC_BITS else 0


def affine_parameters(lo: Tensor, hi: Tensor, bits: int, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the grid that covers `[lo, hi]` and zero (Eq. 2-3).

    `lo` and `hi` have the same shape, and so have the results. Zero points are integers stored as float32. A degenerate
    range gives scale 1 and zero point 0 (`2^(bits-1)` on the symmetric grid), never a scale of 0, NaN or Inf.
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
    """Return the centred integer codes of `x` in the dtype of `x`. `scale`, `zero_point` and `divisor` broadcast
    against `x`."""
    return _codes(x * _multiplier(scale, divisor), zero_point, bits, low)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, low: int = 0, divisor: Tensor | None = None
) -> Tensor:
    """Return `scale * centred_codes(x)`, the value that an integer kernel computes with, in float. Differentiable in
    all tensors.

    With a `divisor` s (Weight Dilation) the result is the quantized `x / s`. The division is part of the multiplier and
    costs nothing. Gradients are straight-through for `round` and exact in `scale` (LSQ); `zero_point` is a float that
    is rounded with a straight-through gradient.
    """
    learns = x.requires_grad or scale.requires_grad or zero_point.requires_grad
    if torch.is_grad_enabled() and (learns or (divisor is not None and divisor.requires_grad)):
        result: Tensor = FakeQuantize.apply(x, scale, zero_point, bits, low, divisor)  # type: ignore[no-untyped-call]
        return result
    codes = x * _multiplier(scale, divisor)
    return _codes(codes, zero_point, bits, low).mul_(scale)


class FakeQuantize(torch.autograd.Function):
    """Fused gradients of `fake_quantize`, with few passes over memory and two saved tensors.

    One of the saved tensors is the result, which the operation that reads it keeps anyway. Codes are integers, so
    dividing the result by the scale restores them exactly.
    """

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
        # In place, since memory traffic dominates. |error| <= 1/2 where the code was not clipped.
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
    """Return per-out-channel scale and zero point, `[C_out]` each, with the least squared error over shrunk ranges.

    `weight` is `[C_out, ...]`. The range of each out-channel is multiplied by `candidates` factors from 1 down to
    `smallest`.
    """
    rows = weight.detach().flatten(1)
    factors = torch.linspace(1.0, smallest, candidates).tolist()
    found = []
    for part in rows.split(max(1, AT_ONCE // rows.shape[1])):  # all candidates pass over values that the cache holds
        lo, hi = part.amin(1), part.amax(1)
        lows, highs = (torch.stack([end * factor for factor in factors]) for end in (lo, hi))
        found.append(_least_error(part, None, lows, highs, bits, symmetric)[2:])
    scales, zero_points = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def search_histogram(
    histogram: Tensor, lo: Tensor, hi: Tensor, bits: int, symmetric: bool = False, candidates: int = 60
) -> tuple[Tensor, Tensor]:
    """Return scale and zero point, `[R]` each, with the least squared error on histogrammed activations.

    Both ends of the range shrink independently on a coarse grid and then together on a fine one, since activations
    after SiLU have one short and one long tail.

    Args:
        histogram: counts `[R, B]` of `B` equal bins over `[lo, hi]` for each of `R` independent quantizers (steps, or
            steps times heads).
        lo: lower end of each histogram, `[R]`, as is `hi`.
        candidates: ranges tried in each of the two passes, about.
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


AT_ONCE = 2**18
"""Values on which candidates are tried at once. Small quantizers take few operations, large ones no extra memory."""


def _least_error(
    values: Tensor, counts: Tensor | None, lo: Tensor, hi: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the candidate range with the least squared error for each row: (error, index, scale, zero point), all
    `[R]`.

    `lo` and `hi` `[K, R]` are K candidate ranges. `values` `[R, B]` count `counts` `[R, B]` times each, or once without
    `counts`. The first of equal candidates wins.
    """
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
    """Return the factor `1 / (divisor * scale)` that turns values into codes."""
    return (scale if divisor is None else scale * divisor).reciprocal()


def _codes(scaled: Tensor, zero_point: Tensor, bits: int, low: int) -> Tensor:
    """Round and clip `scaled` in place."""
    return _clip(scaled.round_(), zero_point, bits, low)


def _clip(rounded: Tensor, zero_point: Tensor, bits: int, low: int) -> Tensor:
    """Clip rounded values in place to the centred codes of the grid.

    Two binary operations are used, since `clamp` with tensor bounds is not vectorised.
    """
    zero = zero_point.round()
    if torch.compiler.is_compiling():  # graphs have no `out` and fuse the two operations
        return rounded.maximum(low - zero).minimum(levels(bits) - zero)
    torch.maximum(rounded, low - zero, out=rounded)
    return torch.minimum(rounded, levels(bits) - zero, out=rounded)


def _dot_to(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Return `(a * b).sum_to_size(shape)`, without storing the product where `shape` keeps leading dimensions only."""
    kept = next((i for i, n in enumerate(shape) if n == 1), len(shape))
    if all(n == 1 for n in shape[kept:]) and tuple(shape[:kept]) == tuple(a.shape[:kept]) and kept < a.dim():
        dots: Tensor = torch.linalg.vecdot(a.flatten(kept), b.flatten(kept))
        return dots.view(shape)
    return (a * b).sum_to_size(shape)

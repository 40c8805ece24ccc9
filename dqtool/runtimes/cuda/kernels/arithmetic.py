"""Parts that several kernels share: rounding to codes, activations, the row of the step tables."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activate", "codes_of", "multiplier_of", "step_at"]

ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float below 2^22 that gains and loses it is rounded to the nearest integer, ties to even."""

NONE: tl.constexpr = tl.constexpr(0)
SILU: tl.constexpr = tl.constexpr(1)
GELU_TANH: tl.constexpr = tl.constexpr(2)
GELU: tl.constexpr = tl.constexpr(3)


@triton.jit
def codes_of(scaled, low, high, offset):
    """Return `clip(round(scaled), low, high) + offset`, int8. The bounds are integers, so clipping first changes nothing."""
    clipped = tl.minimum(tl.maximum(scaled, low), high)
    return ((clipped + ROUNDER) - ROUNDER + offset).to(tl.int8)


@triton.jit
def activate(y, ACT: tl.constexpr):
    """Return an activation of float32 `y`."""
    if ACT == SILU:
        y = y / (1.0 + tl.exp(-y))
    if ACT == GELU_TANH:
        y = y / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y)))
    if ACT == GELU:
        y = 0.5 * y * (1.0 + tl.erf(y * 0.70710678118654752))
    return y


@triton.jit
def step_at(rows, unit, per, STATIC: tl.constexpr):
    """Return the row of the step tables for samples `unit`; `per` of them follow each entry of `rows`."""
    if STATIC:
        return (unit * 0).to(tl.int64)
    return tl.load(rows + unit // per)


@triton.jit
def multiplier_of(scale, divisor):
    """Return `1 / (scale * divisor)` rounded once, as the simulation has it."""
    return tl.div_rn(1.0, scale * divisor)

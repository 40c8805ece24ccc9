"""Codes of a layer's input: quantize alone, or after group norm, layer norm, an activation or GEGLU, in one pass over memory.

Group norm needs its statistics first: `group_statistics_kernel` reads the input once more than the pass that writes codes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqtool.runtimes.cuda.kernels.arithmetic import activate, codes_of, multiplier_of, step_at

__all__ = ["group_statistics_kernel", "layer_norm_kernel", "quantize_kernel"]


@triton.jit(do_not_specialize=["pixels", "W", "chunk"])
def group_statistics_kernel(
    x, out, pixels, W, sn, sh, sw, sc, G, width, chunk,
    S: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write mean and sum of squared deviations of each of S chunks of the pixels of a group: `out` `[N, G, S, 2]`, float32.

    `x` `[N, C, H, W]` has strides (sn, sc, sh, sw); a group has `width` channels, `BC` is the next power of two.
    """
    n = tl.program_id(0) // G
    g = tl.program_id(0) % G
    s = tl.program_id(1)
    first = s * chunk
    last = tl.minimum(first + chunk, pixels)
    c = tl.arange(0, BC)
    base = x + n.to(tl.int64) * sn + (g * width + c).to(tl.int64)[None, :] * sc
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(first, last, BP):
        p = start + tl.arange(0, BP)
        live = (p < last)[:, None] & (c < width)[None, :]
        at = (p // W).to(tl.int64) * sh + (p % W).to(tl.int64) * sw
        total += tl.load(base + at[:, None], mask=live, other=0).to(tl.float32)
    count = tl.maximum((last - first).to(tl.float32) * width, 1.0)
    mean = tl.sum(tl.sum(total, 1), 0) / count
    total = tl.zeros((BP, BC), tl.float32)
    for start in range(first, last, BP):  # the second pass reads the cache
        p = start + tl.arange(0, BP)
        live = (p < last)[:, None] & (c < width)[None, :]
        at = (p // W).to(tl.int64) * sh + (p % W).to(tl.int64) * sw
        d = tl.load(base + at[:, None], mask=live, other=0).to(tl.float32) - mean
        total += tl.where(live, d * d, 0.0)
    to = out + ((n * G + g) * S + s) * 2
    tl.store(to, mean)
    tl.store(to + 1, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["H", "W", "HP", "WP", "top", "left", "blocks", "per", "chunk"])
def quantize_kernel(
    x, out, steps, rows, divisor, statistics, gamma, beta, extra_scale, extra_shift,
    H, W, sn, sh, sw, sc, C, width, padded, total, HP, WP, top, left, up, blocks, per, chunk, G, group, eps,
    ACT: tl.constexpr, GEGLU: tl.constexpr, STATIC: tl.constexpr, DIVIDED: tl.constexpr, NORM: tl.constexpr,
    AFFINE: tl.constexpr, EXTRA: tl.constexpr, S: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write codes int8 `[N, HP, WP, total]` of `act(norm(x))`, with the code of zero around the image.

    `x` `[N, C, H, W]` has strides (sn, sc, sh, sw), and its pixels are repeated `up` times. Each group of `width` channels takes
    `padded` codes of the `total`. `statistics` `[N, G, S, 2]` are those of `group_statistics_kernel` with groups of `group`
    channels and `chunk` pixels. `extra_scale`, `extra_shift` are `[N, C]`. GEGLU reads gates from the channels after `C`.
    """
    n = tl.program_id(0) // blocks
    p = tl.program_id(0) % blocks * BP + tl.arange(0, BP)
    k = tl.program_id(1) * BC + tl.arange(0, BC)
    c = k // padded * width + k % padded
    real = (k < total) & (k % padded < width)
    row, column = p // WP - top, p % WP - left
    inside = (p < HP * WP) & (row >= 0) & (row < H * up) & (column >= 0) & (column < W * up)
    live = inside[:, None] & real[None, :]
    at = n.to(tl.int64) * sn + (row // up).to(tl.int64) * sh + (column // up).to(tl.int64) * sw
    at = at[:, None] + (c.to(tl.int64) * sc)[None, :]
    y = tl.load(x + at, mask=live, other=0).to(tl.float32)
    if NORM:
        s = tl.arange(0, S)
        each = statistics + (((n * G + c // group)[:, None] * S + s[None, :]) * 2)
        counts = tl.maximum(tl.minimum(H * W - s * chunk, chunk), 0).to(tl.float32)[None, :] * group
        count = (H * W).to(tl.float32) * group  # in floats: the integers of large images end before it
        means = tl.load(each, mask=real[:, None], other=0)
        mean = tl.sum(means * counts, 1) / count
        d = means - mean[:, None]
        squares = tl.sum(tl.load(each + 1, mask=real[:, None], other=0) + counts * d * d, 1)
        a = 1.0 / tl.sqrt_rn(squares / count + eps)
        if AFFINE:
            a = a * tl.load(gamma + c, mask=real, other=0).to(tl.float32)
            b = tl.load(beta + c, mask=real, other=0).to(tl.float32) - mean * a
        else:
            b = -mean * a
        if EXTRA:
            e = 1.0 + tl.load(extra_scale + n * C + c, mask=real, other=0).to(tl.float32)
            a = a * e
            b = b * e + tl.load(extra_shift + n * C + c, mask=real, other=0).to(tl.float32)
        y = tl.fma(y, a[None, :] + tl.zeros_like(y), b[None, :] + tl.zeros_like(y))
    if GEGLU:
        gate = tl.load(x + at + tl.cast(C, tl.int64) * sc, mask=live, other=0).to(tl.float32)
        y = y * activate(gate, 3)
    else:
        y = activate(y, ACT)
    step = step_at(rows, n, per, STATIC) * 4
    low, high = tl.load(steps + step), tl.load(steps + step + 1)
    offset, scale = tl.load(steps + step + 2), tl.load(steps + step + 3)
    if DIVIDED:
        m = multiplier_of(scale, tl.load(divisor + c, mask=real, other=1))[None, :]
    else:
        m = multiplier_of(scale, 1.0)
    y = tl.where(live, y * m, 0.0)
    to = (n.to(tl.int64) * HP * WP + p)[:, None] * total + k[None, :]
    tl.store(out + to, codes_of(y, low, high, offset), mask=(p < HP * WP)[:, None] & (k < total)[None, :])


@triton.jit(do_not_specialize=["M", "positions", "per"])
def layer_norm_kernel(
    x, out, steps, rows, divisor, gamma, beta, extra_scale, extra_shift,
    M, positions, per, C, total, extra_stride, eps,
    AFFINE: tl.constexpr, EXTRA: tl.constexpr, STATIC: tl.constexpr, DIVIDED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write codes int8 `[M, total]` of the layer norm of rows `x` `[M, C]`, times `1 + extra_scale`, plus `extra_shift`.

    Both extras are `[N, C]` for samples of `positions` rows, with the stride `extra_stride`. `BC` is at least `C`.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    c = tl.arange(0, BC)
    real = c < C
    live = (r < M)[:, None] & real[None, :]
    sample = tl.minimum(r, M - 1) // positions
    y = tl.load(x + (r.to(tl.int64)[:, None] * C + c[None, :]), mask=live, other=0).to(tl.float32)
    mean = tl.sum(y, 1) / C
    d = tl.where(live, y - mean[:, None], 0.0)
    a = 1.0 / tl.sqrt_rn(tl.sum(d * d, 1) / C + eps)[:, None]
    b = -mean[:, None] * a
    if AFFINE:
        weight = tl.load(gamma + c, mask=real, other=0).to(tl.float32)[None, :]
        a, b = a * weight, b * weight + tl.load(beta + c, mask=real, other=0).to(tl.float32)[None, :]
    else:
        a, b = a + tl.zeros_like(y), b + tl.zeros_like(y)
    if EXTRA:
        at = sample[:, None] * extra_stride + c[None, :]
        e = 1.0 + tl.load(extra_scale + at, mask=live, other=0).to(tl.float32)
        a = a * e
        b = tl.fma(b, e, tl.load(extra_shift + at, mask=live, other=0).to(tl.float32))
    y = tl.fma(y, a, b)
    step = step_at(rows, sample, per, STATIC) * 4
    low, high = tl.load(steps + step)[:, None], tl.load(steps + step + 1)[:, None]
    offset, scale = tl.load(steps + step + 2)[:, None], tl.load(steps + step + 3)[:, None]
    if DIVIDED:
        m = multiplier_of(scale, tl.load(divisor + c, mask=real, other=1)[None, :])
    else:
        m = multiplier_of(scale, 1.0)
    y = tl.where(live, y * m, 0.0)
    to = r.to(tl.int64)[:, None] * total + c[None, :]
    tl.store(out + to, codes_of(y, low, high, offset), mask=(r < M)[:, None] & (c < total)[None, :])

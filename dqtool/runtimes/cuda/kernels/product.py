"""int8 products on tensor cores: linear layers, and convolutions as implicit matrix products over channels-last codes.

The codes of a convolution carry its padding, and pixels are padded to whole chunks of codes, so that the inner loop has no mask.
Rows and columns past the end repeat the last one and are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqtool.runtimes.cuda.kernels.arithmetic import activate, codes_of, multiplier_of, step_at

__all__ = ["product_kernel"]


@triton.jit
def plane_half(plane, at, i, HALF: tl.constexpr, WIDTH: tl.constexpr, BK: tl.constexpr):
    """Return bits of the codes of half a chunk, uint8 `[BK / 2, BN]`: the plane of `WIDTH` bits, rows `at` `[BN]` bytes in."""
    BYTES: tl.constexpr = BK * WIDTH // 8
    e = tl.arange(0, BK // 2)
    if WIDTH == 4:  # each half has all bytes
        byte = tl.load(plane + (at[None, :] + (i * BYTES + e)[:, None]))
        bits = (byte & 15) if HALF == 0 else (byte >> 4)
    else:
        e = e + HALF * (BK // 2)
        byte = tl.load(plane + (at[None, :] + (i * BYTES + e % BYTES)[:, None]))
        shift = (e // BYTES * WIDTH).to(tl.uint8)
        bits = (byte >> shift[:, None]) & ((1 << WIDTH) - 1)
    return bits


LOW_NIBBLES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $1, 0x0f0f0f0f; or.b32 t, t, 0x80808080; sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080; }"
)
HIGH_NIBBLES: tl.constexpr = tl.constexpr(
    "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 t, t, 0x0f0f0f0f; or.b32 t, t, 0x80808080; sub.u32 t, t, $2; "
    "xor.b32 $0, t, 0x80808080; }"
)
"""Four nibbles minus four zero points at once: bit 7 of each byte is set meanwhile, so that no byte borrows from the next."""


@triton.jit
def nibbles(plane, at, zero, i, HALF: tl.constexpr, BK: tl.constexpr):
    """Return centred codes of half a chunk of 4-bit codes, int8 `[BK / 2, BN]`, by machine instructions for four codes each."""
    e = tl.arange(0, BK // 2)
    byte = tl.load(plane + (at[None, :] + (i * (BK // 2) + e)[:, None]))
    zeros = tl.broadcast_to(zero[None, :], byte.shape)
    return tl.inline_asm_elementwise(
        LOW_NIBBLES if HALF == 0 else HIGH_NIBBLES, "=r,r,r", [byte, zeros], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def weight_tile(
    w, channel, zero, i, K, total, HALF: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr
):
    """Return centred codes int8 of the out-channels `channel`: `[BK, BN]` at 8 bits, half a chunk `[BK / 2, BN]` below.

    `total` is the number of codes of the weight, `zero` holds the zero points of the channels.
    """
    first = channel.to(tl.int64) * K
    if BITS == 8:
        k = tl.arange(0, BK)
        tile = tl.load(w + (first[None, :] + (i * BK + k)[:, None])).to(tl.int8, bitcast=True)
    elif BITS == 4 and ASM:
        tile = nibbles(w, first // 2, zero, i, HALF, BK)
    else:
        if BITS <= 3:
            code = plane_half(w, first // 4, i, HALF, 2, BK)
        else:
            code = plane_half(w, first // 2, i, HALF, 4, BK)
        if BITS == 3:
            code = code | (plane_half(w + total // 4, first // 8, i, HALF, 1, BK) << 2)
        if BITS == 5:
            code = code | (plane_half(w + total // 2, first // 8, i, HALF, 1, BK) << 4)
        if BITS >= 6:
            code = code | (plane_half(w + total // 2, first // 4, i, HALF, 2, BK) << 4)
        if BITS == 7:
            code = code | (plane_half(w + total // 2 + total // 4, first // 8, i, HALF, 1, BK) << 6)
        tile = code.to(tl.int8) - zero[None, :]
    return tile


@triton.jit
def finished(acc, scale, w_scale, channel, sample, bias, gate, BIAS: tl.constexpr, GATE: tl.constexpr, gate_stride, NC):
    """Return `(acc * scale + bias) * gate`, float32 `[BM, BN]`. `bias` is `[C]` (BIAS 1) or `[N, C]` (BIAS 2)."""
    s = tl.load(w_scale + channel)[None, :] * scale
    y = acc.to(tl.float32)
    if BIAS == 1:
        y = tl.fma(y, s, tl.load(bias + channel)[None, :].to(tl.float32) + tl.zeros_like(y))
    elif BIAS == 2:
        y = tl.fma(y, s, tl.load(bias + (sample[:, None] * NC + channel[None, :])).to(tl.float32))
    else:
        y = y * s
    if GATE:
        y = y * tl.load(gate + (sample[:, None] * gate_stride + channel[None, :])).to(tl.float32)
    return y


@triton.jit(do_not_specialize=["M", "pixels", "per", "HP", "WP", "HO", "WO", "tiles_m"])
def product_kernel(
    x, w, zeros, sums, w_scale, steps, rows, bias, gate, residual, out, next_steps, next_divisor,
    M, N, NC, K, ROW, CP, HP, WP, HO, WO, pixels, per, tiles_m, gate_stride, next_row, post,
    CONV: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BITS: tl.constexpr, SIGNED: tl.constexpr, STATIC: tl.constexpr, BIAS: tl.constexpr,
    GATE: tl.constexpr, RESIDUAL: tl.constexpr, POST: tl.constexpr, GEGLU: tl.constexpr, ACT: tl.constexpr,
    CODES: tl.constexpr, NEXT_STATIC: tl.constexpr, NEXT_DIVIDED: tl.constexpr, RAW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Multiply codes by a weight, and write floats `[M, NC]` or the next layer's codes `[M, next_row]`.

    `x` int8: pixels of `ROW` codes, `CP` of each group; a linear layer has `M` of them, a convolution `HP * WP` a sample. `w`: see
    `planes.py`, `K` codes a row, `N` rows a group. `steps` `[T, 4]` are smallest and largest code, offset and scale. Stored codes
    are `c + offset`; the offset times `sums` (the sums of the weight's rows) is subtracted. `rows`, `per`: see `step_at`.
    `pixels` are a sample's rows of the result. GEGLU reads values and gates from columns `j` and `NC + j`. RAW writes accumulators.
    """
    pid = tl.program_id(0)
    group = tl.program_id(1)
    tiles_n = tl.cdiv(N, BN)
    width = GROUP * tiles_n  # tiles of neighbouring rows share columns in the L2 cache
    first_m = pid // width * GROUP
    here = tl.minimum(tiles_m - first_m, GROUP)
    pid_m = first_m + pid % width % here
    pid_n = pid % width // here

    offs_m = pid_m * BM + tl.arange(0, BM)
    live_m = tl.minimum(offs_m, M - 1)
    sample = live_m // pixels
    if CONV:
        p = live_m % pixels
        base = ((sample.to(tl.int64) * HP + p // WO * SH) * WP + p % WO * SW) * ROW + group * CP
    else:
        base = live_m.to(tl.int64) * ROW
    offs_n = pid_n * BN + tl.arange(0, BN)
    channel = group * N + tl.minimum(offs_n, N - 1)
    total = tl.cast(NC, tl.int64) * K  # one out-channel is a constant of the compiler
    if GEGLU:
        total = total * 2
    zero = tl.zeros((BN,), tl.int8)
    zero_g = tl.zeros((BN,), tl.int8)
    if BITS < 8:
        zero = tl.load(zeros + channel).to(tl.int8, bitcast=True)
        if GEGLU:
            zero_g = tl.load(zeros + NC + channel).to(tl.int8, bitcast=True)

    HALVES: tl.constexpr = 1 if BITS == 8 else 2
    KH: tl.constexpr = BK // HALVES
    k = tl.arange(0, KH)
    acc = tl.zeros((BM, BN), tl.int32)
    acc_g = tl.zeros((BM, BN), tl.int32)
    per_tap = CP // BK
    for i in range(0, K // BK):
        if CONV:
            tap = i // per_tap
            shift = (tap // KW * DH * WP + tap % KW * DW) * ROW + (i % per_tap) * BK
        else:
            shift = i * BK
        for h in tl.static_range(HALVES):
            a = tl.load(x + (base[:, None] + (shift + h * KH + k)[None, :]))
            b = weight_tile(w, channel, zero, i, K, total, h, BITS, BK, ASM)
            acc = tl.dot(a, b, acc, out_dtype=tl.int32)
            if GEGLU:
                b = weight_tile(w, NC + channel, zero_g, i, K, total, h, BITS, BK, ASM)
                acc_g = tl.dot(a, b, acc_g, out_dtype=tl.int32)

    step = step_at(rows, sample, per, STATIC)
    if not SIGNED:
        offset = tl.load(steps + step * 4 + 2).to(tl.int32)
        acc -= offset[:, None] * tl.load(sums + channel)[None, :]
        if GEGLU:
            acc_g -= offset[:, None] * tl.load(sums + NC + channel)[None, :]
    live = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    column = group * N + offs_n  # not clamped: neighbours are stored together
    at = offs_m.to(tl.int64)[:, None] * NC + column[None, :]
    if RAW:
        tl.store(out + at, acc, mask=live)
    else:
        scale = tl.load(steps + step * 4 + 3)[:, None]
        y = finished(acc, scale, w_scale, channel, sample, bias, gate, BIAS, GATE, gate_stride, NC)
        if GEGLU:
            g = finished(acc_g, scale, w_scale + NC, channel, sample, bias + NC, gate, BIAS, GATE, gate_stride, NC)
            y = y * activate(g, 3)
        else:
            y = activate(y, ACT)
        if RESIDUAL:
            y = y + tl.load(residual + at, mask=live, other=0).to(tl.float32)
        if POST:
            y = y * post
        if CODES:
            after = step_at(rows, sample, per, NEXT_STATIC) * 4
            low, high = tl.load(next_steps + after)[:, None], tl.load(next_steps + after + 1)[:, None]
            offset, scale = tl.load(next_steps + after + 2)[:, None], tl.load(next_steps + after + 3)[:, None]
            if NEXT_DIVIDED:
                m = multiplier_of(scale, tl.load(next_divisor + channel)[None, :])
            else:
                m = multiplier_of(scale, 1.0)
            at = offs_m.to(tl.int64)[:, None] * next_row + column[None, :]
            tl.store(out + at, codes_of(y * m, low, high, offset), mask=live)
        else:
            tl.store(out + at, y.to(out.dtype.element_ty), mask=live)

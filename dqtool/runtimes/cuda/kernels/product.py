"""int8 products on tensor cores: linear layers, and convolutions as implicit matrix products over channels-last codes.

The codes of a convolution carry its padding, and pixels are padded to whole chunks of codes, so that the inner loop has no mask.
Rows and columns past the end repeat the last one and are not stored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqtool.runtimes.cuda.kernels.arithmetic import activate, codes_of, multiplier_of, step_at

__all__ = ["product_kernel"]

constexpr_function = getattr(triton, "constexpr_function", None) or tl.constexpr_function
"""Decorator of functions that the compiler calls. Triton 3.4 has it in its language alone, later ones not there."""


@constexpr_function
def unpacking(widths, half):
    """Return machine instructions that unpack four codes at once from bytes of planes of these `widths`, minus zero points.

    Operands: the planes' bytes, four zero points, then a shift for each plane but those of 4 bits, whose shift is that of the
    `half`. Bit 7 of each byte is set meanwhile, so that no byte borrows from the next.
    """
    zero, shift = len(widths) + 1, len(widths) + 2
    lines, low = [".reg .b32 t, u;"], 0
    for plane, width in enumerate(widths):
        part = "u" if plane else "t"
        source = f"${plane + 1}"
        if width != 4:
            lines.append(f"shr.b32 {part}, {source}, ${shift};")
            source, shift = part, shift + 4  # a register for each of the four codes
        elif half:
            lines.append(f"shr.b32 {part}, {source}, 4;")
            source = part
        lines.append(f"and.b32 {part}, {source}, {0x01010101 * ((1 << width) - 1):#x};")
        if plane:
            lines += [f"shl.b32 u, u, {low};", "or.b32 t, t, u;"]
        low += width
    lines += ["or.b32 t, t, 0x80808080;", f"sub.u32 t, t, ${zero};", "xor.b32 $0, t, 0x80808080;"]
    return "{ " + " ".join(lines) + " }"


@constexpr_function
def operands(planes, shifts):
    """Return the constraints of `unpacking`: a register for four bytes, four for a shift that is the same for all."""
    return ",".join(["=r", *["r"] * (planes + 1 + 4 * shifts)])


@triton.jit
def plane_bytes(plane, channel, i, K, WIDTH: tl.constexpr, BK: tl.constexpr):
    """Return the bytes uint8 `[BK / 2, BN]` of a plane of `WIDTH` bits that hold chunk `i` of the out-channels `channel`."""
    HALF: tl.constexpr = BK // 2
    CHUNKS: tl.constexpr = 4 // WIDTH
    row = tl.cdiv(K // HALF, 8 // WIDTH) * HALF  # a multiple that the compiler sees: 16 bytes are copied at a time
    at = channel.to(tl.int64) * row
    return tl.load(plane + (at[None, :] + (i // CHUNKS * HALF + tl.arange(0, HALF))[:, None]))


@triton.jit
def plane_end(plane, total_rows, K, WIDTH: tl.constexpr, BK: tl.constexpr):
    """Return where the plane after `plane` begins."""
    return plane + tl.cast(total_rows, tl.int64) * (tl.cdiv(K // (BK // 2), 8 // WIDTH) * (BK // 2))


@triton.jit
def slot(i, HALF: tl.constexpr, WIDTH: tl.constexpr):
    """Return the lowest bit of half `HALF` of chunk `i` in its bytes of a plane."""
    return (i % (4 // WIDTH) * 2 + HALF) * WIDTH


@triton.jit
def bits_of(byte, shift, WIDTH: tl.constexpr):
    """Return `WIDTH` bits of each byte from bit `shift` on."""
    return (byte >> tl.cast(shift, tl.uint8)) & ((1 << WIDTH) - 1)


@triton.jit
def bytes_tile(w, channel, i, K, BK: tl.constexpr):
    """Return chunk `i` of the 8-bit codes of the out-channels `channel`, int8 `[BK, BN]`."""
    at = i * BK + tl.arange(0, BK)
    return tl.load(w + ((channel.to(tl.int64) * K)[None, :] + at[:, None])).to(tl.int8, bitcast=True)


@triton.jit
def planes_tile(
    w, channel, zero, i, K, rows, HALF: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr
):
    """Return centred codes int8 `[BK / 2, BN]` of the out-channels `channel`: half of chunk `i`.

    `rows` is the number of out-channels of the weight, `zero` holds the zero points of the channels.
    """
    FIRST: tl.constexpr = 2 if BITS < 4 else 4
    THIN: tl.constexpr = BITS == 3 or BITS == 5 or BITS == 7
    byte = plane_bytes(w, channel, i, K, FIRST, BK)
    zeros = tl.broadcast_to(zero[None, :], byte.shape)
    if BITS >= 6:
        w2 = plane_end(w, rows, K, 4, BK)
        byte2 = plane_bytes(w2, channel, i, K, 2, BK)
        s2 = slot(i, HALF, 2)
        if BITS == 7:
            byte1 = plane_bytes(plane_end(w2, rows, K, 2, BK), channel, i, K, 1, BK)
    elif THIN:
        byte1 = plane_bytes(plane_end(w, rows, K, FIRST, BK), channel, i, K, 1, BK)
    s0 = slot(i, HALF, FIRST)
    s1 = slot(i, HALF, 1)
    if not ASM:
        code = bits_of(byte, s0, FIRST)
        if BITS >= 6:
            code = code | (bits_of(byte2, s2, 2) << 4)
        if THIN:
            code = code | (bits_of(byte1, s1, 1) << (BITS - 1))
        tile = code.to(tl.int8) - zeros
    elif BITS == 2:
        parts = [byte, zeros, s0]
        tile = tl.inline_asm_elementwise(unpacking((2,), HALF), operands(1, 1), parts, tl.int8, is_pure=True, pack=4)
    elif BITS == 3:
        parts = [byte, byte1, zeros, s0, s1]
        tile = tl.inline_asm_elementwise(unpacking((2, 1), HALF), operands(2, 2), parts, tl.int8, is_pure=True, pack=4)
    elif BITS == 4:
        parts = [byte, zeros]
        tile = tl.inline_asm_elementwise(unpacking((4,), HALF), operands(1, 0), parts, tl.int8, is_pure=True, pack=4)
    elif BITS == 5:
        parts = [byte, byte1, zeros, s1]
        tile = tl.inline_asm_elementwise(unpacking((4, 1), HALF), operands(2, 1), parts, tl.int8, is_pure=True, pack=4)
    elif BITS == 6:
        parts = [byte, byte2, zeros, s2]
        tile = tl.inline_asm_elementwise(unpacking((4, 2), HALF), operands(2, 1), parts, tl.int8, is_pure=True, pack=4)
    else:
        parts = [byte, byte2, byte1, zeros, s2, s1]
        tile = tl.inline_asm_elementwise(
            unpacking((4, 2, 1), HALF), operands(3, 2), parts, tl.int8, is_pure=True, pack=4
        )
    return tile


@triton.jit
def weight_tile(
    w, channel, zero, i, K, rows, HALF: tl.constexpr, BITS: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr
):
    """Return `bytes_tile` at 8 bits, `planes_tile` below."""
    if BITS == 8:
        tile = bytes_tile(w, channel, i, K, BK)
    else:
        tile = planes_tile(w, channel, zero, i, K, rows, HALF, BITS, BK, ASM)
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
    CODES: tl.constexpr, NEXT_STATIC: tl.constexpr, NEXT_DIVIDED: tl.constexpr, RAW: tl.constexpr, PART: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Multiply codes by a weight, and write floats `[M, NC]` or the next layer's codes `[M, next_row]`.

    `x` int8: pixels of `ROW` codes, `CP` of each group; a linear layer has `M` of them, a convolution `HP * WP` a sample. `w`: see
    `planes.py`, `K` codes a row, `N` rows a group. `steps` `[T, 4]` are smallest and largest code, offset and scale. Stored codes
    are `c + offset`; the offset times `sums` (the sums of the weight's rows) is subtracted. `rows`, `per`: see `step_at`.
    `pixels` are a sample's rows of the result. GEGLU reads values and gates from columns `j` and `NC + j`. RAW writes accumulators.
    PART 1 adds the sums of its share of the codes to `out` int32 `[M, NC]`, in any order with one result; PART 2 takes them from `x`.
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
    rows_w = tl.cast(NC, tl.int64) * (2 if GEGLU else 1)  # one out-channel is a constant of the compiler
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
    first_chunk, last_chunk = 0, K // BK
    if PART == 1:
        share = tl.cdiv(K // BK, tl.num_programs(2))
        first_chunk = tl.program_id(2) * share
        last_chunk = tl.minimum(first_chunk + share, K // BK)
    if PART != 2:
        for i in range(first_chunk, last_chunk):
            if CONV:
                tap = i // per_tap
                shift = (tap // KW * DH * WP + tap % KW * DW) * ROW + (i % per_tap) * BK
            else:
                shift = i * BK
            for h in tl.static_range(HALVES):
                a = tl.load(x + (base[:, None] + (shift + h * KH + k)[None, :]))
                b = weight_tile(w, channel, zero, i, K, rows_w, h, BITS, BK, ASM)
                acc = tl.dot(a, b, acc, out_dtype=tl.int32)
                if GEGLU:
                    b = weight_tile(w, NC + channel, zero_g, i, K, rows_w, h, BITS, BK, ASM)
                    acc_g = tl.dot(a, b, acc_g, out_dtype=tl.int32)
    live = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    column = group * N + offs_n  # not clamped: neighbours are stored together
    at = offs_m.to(tl.int64)[:, None] * NC + column[None, :]
    if PART == 1:
        tl.atomic_add(out + at, acc, mask=live, sem="relaxed")
    else:
        if PART == 2:
            acc = tl.load(x + at, mask=live, other=0)
        step = step_at(rows, sample, per, STATIC)
        if not SIGNED:
            offset = tl.load(steps + step * 4 + 2).to(tl.int32)
            acc -= offset[:, None] * tl.load(sums + channel)[None, :]
            if GEGLU:
                acc_g -= offset[:, None] * tl.load(sums + NC + channel)[None, :]
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

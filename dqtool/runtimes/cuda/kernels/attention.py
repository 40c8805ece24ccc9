"""Attention on integer codes: quantized operands, then both products and the softmax between them.

A softmax code needs the sum of its whole row, so scores are computed twice: once for the row's largest score and its sum, and
once for the codes that multiply `v`. Neither scores nor codes are written to memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dqtool.runtimes.cuda.kernels.arithmetic import ROUNDER, codes_of, step_at

__all__ = ["attention_kernel", "operand_kernel"]

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["S", "per"])
def operand_kernel(
    x, out, sums, tables, rows, sn, sh, ss, sd, H, S, SP, D, per, which,
    STATIC: tl.constexpr, TRANSPOSED: tl.constexpr, SUMS: tl.constexpr, BS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Write the codes int8 of an operand `[N, H, S, D]`: `[N, H, SP, DP]`, or transposed `[N, H, DP, SP]`; zeros beside them.

    `tables` `[T, 4, 3, H]` hold multiplier, smallest and largest code; `which` is the operand. `sums` int32 `[N, H, DP]` gain
    the sums over positions.
    """
    blocks = tl.cdiv(SP, BS)
    nh = (
        tl.program_id(0) // blocks
    )  # one axis: a grid's second one ends at 65535, and temporal attention has more heads
    n = nh // H
    h = nh % H
    s = tl.program_id(0) % blocks * BS + tl.arange(0, BS)
    d = tl.arange(0, DP)
    live = (s < S)[:, None] & (d < D)[None, :]
    at = n.to(tl.int64) * sn + h.to(tl.int64) * sh + s.to(tl.int64)[:, None] * ss + (d.to(tl.int64) * sd)[None, :]
    y = tl.load(x + at, mask=live, other=0).to(tl.float32)
    table = tables + ((step_at(rows, n, per, STATIC) * 4 + which) * 3) * H + h
    m, low, high = tl.load(table), tl.load(table + H), tl.load(table + 2 * H)
    codes = codes_of(tl.where(live, y * m, 0.0), low, high, 0.0)
    inside = (s < SP)[:, None] & (d < DP)[None, :]
    base = nh.to(tl.int64) * SP * DP
    if TRANSPOSED:
        tl.store(out + (base + d[None, :].to(tl.int64) * SP + s[:, None]), codes, mask=inside)
    else:
        tl.store(out + (base + s[:, None].to(tl.int64) * DP + d[None, :]), codes, mask=inside)
    if SUMS:
        tl.atomic_add(sums + (nh * DP + d), tl.sum(codes.to(tl.int32), 0))


@triton.jit
def scores_of(
    q, k, base, j, SK, SP, scale, mask, mask_at, mask_k, MASK: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr
):
    """Return a tile of scores times log2(e), float32 `[BM, BN]`; minus infinity past the last key."""
    key = j + tl.arange(0, BN)
    d = tl.arange(0, DP)
    keys = tl.load(k + (base + key.to(tl.int64)[None, :] * DP + d[:, None]))
    z = tl.dot(q, keys, out_dtype=tl.int32).to(tl.float32) * scale
    live = key < SK
    if MASK:
        added = tl.load(mask + (mask_at[:, None] + (key.to(tl.int64) * mask_k)[None, :]), mask=live[None, :], other=0)
        z = tl.fma(added.to(tl.float32), LOG2E + tl.zeros_like(z), z)
    return tl.where(live[None, :], z, float("-inf"))


@triton.jit(do_not_specialize=["SQ", "SK", "per"])
def attention_kernel(
    q, k, v, sums, tables, scores, results, rows, mask, out,
    mask_n, mask_h, mask_q, mask_k, H, SQ, SQP, SK, SKP, D, per, factor,
    STATIC: tl.constexpr, MASK: tl.constexpr, OFFSET: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Write `softmax(q k^T scale + mask) v`, `[N, SQ, H * D]`, of codes `q` `[N, H, SQP, DP]`, `k` `[N, H, SKP, DP]` and `v`
    `[N, H, DP, SKP]`. `scores` `[T, H]` times `factor`, and
    `results` `[T, H]`, are the scales of both products. Codes of probabilities are stored minus
    `OFFSET`, so that they fit int8; `sums` restore it.
    """
    nh = tl.program_id(0) // (SQP // BM)
    n = nh // H
    h = nh % H
    step = step_at(rows, n, per, STATIC)
    scale = tl.load(scores + step * H + h) * factor * LOG2E
    m = tl.program_id(0) % (SQP // BM) * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    codes = tl.load(q + (nh.to(tl.int64) * SQP * DP + m[:, None] * DP + d[None, :]))
    base = nh.to(tl.int64) * SKP * DP
    mask_at = n.to(tl.int64) * mask_n + h.to(tl.int64) * mask_h + tl.minimum(m, SQ - 1).to(tl.int64) * mask_q

    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    for j in range(0, SK, BN):
        z = scores_of(codes, k, base, j, SK, SKP, scale, mask, mask_at, mask_k, MASK, BN, DP)
        new = tl.maximum(top, tl.max(z, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(z - safe[:, None]), 1)
        top = new
    top = tl.where(top == float("-inf"), 0.0, top)

    table = tables + ((step * 4 + 3) * 3) * H + h
    to_code = tl.load(table) / tl.where(total == 0.0, 1.0, total)
    high = tl.load(table + 2 * H)
    acc = tl.zeros((BM, DP), tl.int32)
    key = tl.arange(0, BN)
    for j in range(0, SK, BN):
        z = scores_of(codes, k, base, j, SK, SKP, scale, mask, mask_at, mask_k, MASK, BN, DP)
        p = tl.minimum(tl.exp2(z - top[:, None]) * to_code[:, None], high)
        p8 = ((p + ROUNDER) - ROUNDER - OFFSET).to(tl.int8)
        values = tl.load(v + (base + d[None, :].to(tl.int64) * SKP + (j + key)[:, None]))
        acc = tl.dot(p8, values, acc, out_dtype=tl.int32)
    if OFFSET:
        acc += OFFSET * tl.load(sums + (nh * DP + d))[None, :]
    y = acc.to(tl.float32) * tl.load(results + step * H + h)
    to = (n.to(tl.int64) * SQ + m)[:, None] * (H * D) + (h * D + d)[None, :]
    tl.store(out + to, y.to(out.dtype.element_ty), mask=(m < SQ)[:, None] & (d < D)[None, :])

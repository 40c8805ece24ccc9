"""Launches of the Triton kernels: results are allocated, strides and tiles chosen. No call waits for the device."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dqtool.runtimes.cuda.geometry import Geometry, Padding
from dqtool.runtimes.cuda.kernels.attention import attention_kernel, operand_kernel
from dqtool.runtimes.cuda.kernels.product import product_kernel
from dqtool.runtimes.cuda.kernels.prologue import group_statistics_kernel, layer_norm_kernel, quantize_kernel
from dqtool.runtimes.cuda.planes import chunk_of
from dqtool.runtimes.cuda.tiles import attention_tile, block_elements, power_of_two, product_tile, statistics_split

__all__ = ["attend", "group_statistics", "layer_norm_codes", "multiply_codes", "quantize_image"]

GEGLU = 4
"""See `dqtool.runtimes.cpu.codes`."""


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up."""
    return -(-a // b)


def samples_per_row(rows: Tensor, samples: int) -> int:
    """Return how many of `samples` take each entry of `rows`. An input without the batch takes the first."""
    return samples // len(rows) if samples % len(rows) == 0 and samples else max(samples, 1)


def on_device_of(x: Tensor) -> Any:
    """Return a context in which kernels start on the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(width: int, rows: int, times: int = 1) -> int:
    """Return the rows of a block of `width` columns of an element-wise kernel, at most as many as there are. The block has up to
    `times` the usual elements."""
    return max(1, min(times * block_elements() // width, power_of_two(rows)))


def group_statistics(x: Tensor, groups: int) -> tuple[Tensor, int]:
    """Return the statistics `[N, G, S, 2]` of an image `[N, C, H, W]`, and the pixels of each of the S chunks."""
    n, c, h, w = x.shape
    width = c // groups
    split = statistics_split(n * groups, h * w)
    chunk = cdiv(h * w, split)
    out = x.new_empty((n, groups, split, 2), dtype=torch.float32)
    strides = (x.stride(0), x.stride(2), x.stride(3), x.stride(1))
    block = power_of_two(width)
    with on_device_of(x):
        group_statistics_kernel[(n * groups, split)](
            x, out, h * w, w, *strides, groups, width, chunk, S=split, BP=_rows(block, h * w), BC=block,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out, chunk


def quantize_image(
    x: Tensor,
    steps: Tensor,
    divisor: Tensor | None,
    rows: Tensor,
    padding: Padding,
    act: int,
    norm: tuple[int, Tensor | None, Tensor | None, float] | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """Return codes `[N, HP, WP, total]` of an image `[N, C, H, W]`. `norm` is (groups, weight, bias, eps) of a group norm."""
    p = padding
    n, _, h, w = x.shape
    total = p.groups * p.channel_bytes
    out = x.new_empty((n, p.height, p.width_padded, total), dtype=torch.int8)
    if not out.numel():
        return out
    wide = min(128, power_of_two(total))
    # Each block merges the statistics of its channels: a tall one does so for more pixels.
    tall = _rows(wide, p.height * p.width_padded, 1 if norm is None else 4)
    blocks = cdiv(p.height * p.width_padded, tall)
    statistics, chunk, groups, weight, bias, eps = x, 1, 1, None, None, 0.0
    if norm is not None:
        groups, weight, bias, eps = norm
        statistics, chunk = group_statistics(x, groups)
    channels = p.width * p.groups
    strides = (x.stride(0), x.stride(2), x.stride(3), x.stride(1))
    if weight is not None and bias is None:
        bias = torch.zeros_like(weight)
    none = steps
    with on_device_of(x):
        quantize_kernel[(n * blocks, cdiv(total, wide))](
            x, out, steps, rows, none if divisor is None else divisor, statistics,
            none if weight is None else weight, none if bias is None else bias,
            none if scale is None else scale, none if shift is None else shift,
            h, w, *strides, channels, p.width, p.channel_bytes, total, p.height, p.width_padded, p.top, p.left, p.up,
            blocks, samples_per_row(rows, n), chunk, groups, max(1, channels // groups), eps,
            ACT=0 if act == GEGLU else act, GEGLU=act == GEGLU, STATIC=len(steps) == 1, DIVIDED=divisor is not None,
            NORM=norm is not None, AFFINE=weight is not None, EXTRA=scale is not None,
            S=statistics.shape[2] if norm is not None else 1, BP=tall, BC=wide, num_warps=4 if norm is None else 8,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def layer_norm_codes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    steps: Tensor,
    divisor: Tensor | None,
    rows: Tensor,
    channel_bytes: int,
) -> Tensor:
    """Return codes `[N * S, channel_bytes]` of the layer norm of `x` `[N, S, C]`; `scale`, `shift` `[N, C]`."""
    n, s, c = x.shape
    out = x.new_empty((n * s, channel_bytes), dtype=torch.int8)
    if not out.numel():
        return out
    block = power_of_two(channel_bytes)
    tall = _rows(block, n * s)
    x = x.contiguous()
    stride = 0
    if scale is not None and shift is not None:
        scale, shift = (t.expand(n, c).contiguous() for t in (scale, shift))
        stride = c
    if weight is not None and bias is None:
        bias = torch.zeros_like(weight)
    none = steps
    with on_device_of(x):
        layer_norm_kernel[(cdiv(n * s, tall),)](
            x, out, steps, rows, none if divisor is None else divisor, none if weight is None else weight,
            none if bias is None else bias, none if scale is None else scale, none if shift is None else shift,
            n * s, s, samples_per_row(rows, n), c, channel_bytes, stride, eps,
            AFFINE=weight is not None, EXTRA=scale is not None, STATIC=len(steps) == 1, DIVIDED=divisor is not None,
            BR=tall, BC=block, num_warps=4 if block <= 2048 else 8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def multiply_codes(
    codes: Tensor,
    weight: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    shape: tuple[int, ...],
    geometry: Geometry,
    out: Tensor,
    post: float = 1.0,
    following: tuple[Tensor, Tensor | None] | None = None,
    act: int = 0,
    raw: bool = False,
    tile: Any = None,
) -> Tensor:
    """Fill `out` with `(product + bias) * gate + residual) * post`, with codes for the layer `following`, or with sums (`raw`).

    `weight` is (planes, zero points, sums, scales). `shape` is the result's without channels; its first size counts samples. `following` is
    (steps, divisor). `bias` is `[C_out]`, or `[N, C_out]` as `gate`.
    """
    g = geometry
    planes, zeros, sums, w_scale = weight
    samples = shape[0] if shape else 1
    if not out.numel():
        return out
    if g.is_conv:
        _, hp, wp, _ = codes.shape
        ho, wo = shape[1:]
        m, pixels = samples * ho * wo, ho * wo
    else:
        hp = wp = ho = wo = 1
        m = len(codes)
        pixels = m // samples
    n = g.out_channels // g.groups
    gated = act == GEGLU
    if gated:
        n //= 2
    tile = tile or product_tile(m, n, g.k, g.bits, gated, codes)
    tiles_m = cdiv(m, tile.rows)
    none = steps

    def start(x: Tensor, to: Tensor, part: int, splits: int) -> None:
        product_kernel[(tiles_m * cdiv(n, tile.columns), g.groups, splits)](
            x, planes, zeros, sums, w_scale, steps, rows, none if bias is None else bias,
            none if gate is None else gate, none if residual is None else residual, to,
            none if following is None else following[0],
            none if following is None or following[1] is None else following[1],
            m, n, n * g.groups, g.k, g.row, g.channel_bytes, hp, wp, ho, wo, pixels, samples_per_row(rows, samples), tiles_m,
            0 if gate is None else gate.stride(0), out.shape[-1], post,
            CONV=bool(g.is_conv), KW=g.kernel_w, SH=g.stride_h, SW=g.stride_w, DH=g.dilation_h, DW=g.dilation_w,
            BITS=g.bits, SIGNED=bool(g.signed), STATIC=len(steps) == 1,
            BIAS=0 if bias is None else bias.dim(), GATE=gate is not None, RESIDUAL=residual is not None, POST=post != 1.0,
            GEGLU=gated, ACT=0 if gated else act, CODES=following is not None,
            NEXT_STATIC=following is None or len(following[0]) == 1,
            NEXT_DIVIDED=following is not None and following[1] is not None, RAW=raw, PART=part,
            BM=tile.rows, BN=tile.columns, BK=chunk_of(g.channel_bytes), GROUP=8, ASM=tile.assembly,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip

    with on_device_of(codes):
        if tile.splits == 1 or gated:
            start(codes, out, 0, 1)
        else:  # too few blocks for the device: several share the codes of each
            total = codes.new_zeros((m, n * g.groups), dtype=torch.int32)
            start(codes, total, 1, tile.splits)
            start(total, out, 2, 1)
    return out


def attend(
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    tables: Tensor,
    scores: Tensor,
    results: Tensor,
    rows: Tensor,
    factor: float,
    largest: int,
) -> Tensor:
    """Return both products and the softmax of `[N, H, S, D]` operands, `[N, S, H * D]`, of the dtype of `q`.

    `factor` multiplies the scores, `largest` is the largest code of a probability.
    """
    query, key, _ = operands
    n, h, sq, d = query.shape
    sk = key.shape[2]
    out = query.new_empty((n, sq, h * d))
    if not out.numel():
        return out
    width = max(32, power_of_two(d))
    tile = attention_tile(sq, sk, width)
    sqp, skp = cdiv(sq, tile.rows) * tile.rows, cdiv(sk, tile.columns) * tile.columns
    per, static = samples_per_row(rows, n), len(tables) == 1
    codes = [query.new_empty((n * h, size, width), dtype=torch.int8) for size in (sqp, skp, skp)]
    offset = 128 if largest > 127 else 0
    sums = query.new_zeros((n * h, width), dtype=torch.int32) if offset else rows
    if mask is not None:
        mask = mask.expand(n, h, sq, sk)
    with on_device_of(query):
        for which, (x, made) in enumerate(zip(operands, codes, strict=True)):
            block = max(16, min(64, 4096 // width))
            operand_kernel[(cdiv(made.shape[1], block) * n * h,)](
                x, made, sums, tables, rows, *x.stride(), h, x.shape[2], made.shape[1], d, per, which,
                STATIC=static, TRANSPOSED=which == 2, SUMS=which == 2 and offset > 0, BS=block, DP=width, num_warps=4,
                enable_fp_fusion=False,
            )  # fmt: skip
        attention_kernel[(sqp // tile.rows * n * h,)](
            *codes, sums, tables, scores, results, rows, query if mask is None else mask, out,
            *((0, 0, 0, 0) if mask is None else mask.stride()), h, sq, sqp, sk, skp, d, per, factor,
            STATIC=static, MASK=mask is not None, OFFSET=offset, BM=tile.rows, BN=tile.columns, DP=width,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return out

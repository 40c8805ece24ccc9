"""The kernels as operations of PyTorch, `torch.ops.dqtool.*`: what `torch.compile` and `torch.export` put into a graph.

An eager network calls the kernels itself, which costs less per layer; while it is traced, `codes.py`, the products and
`attention.py` call these. Each operation comes with the form of its result, so that no graph breaks, and takes the step as
a tensor, so that a new step compiles nothing: `rows` is `[1]`, or holds one row of the step tables for each sample.

`steps` `[T, 4]` are a layer's smallest and largest centred code, zero point and scale at each step. A quantizer is four
arguments: `steps`, its multipliers `[T]` or `[T, C]` (None where that table would be large), its divisor `[C]` or None, and
`rows`. A weight is two tensors, in the form that `geometry` names (`Geometry`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.library import pointer
from dqtool.runtimes.cpu.op_arguments import (
    PACKED,
    Geometry,
    address,
    empty_codes,
    empty_product,
    kernels,
    laid_out,
    packed_weight,
    quantized_runs,
    runs_of_rows,
    step_values,
)

__all__ = [
    "attention",
    "geglu",
    "group_norm",
    "layer_norm",
    "linear_codes",
    "multiply",
    "onednn_multiply",
    "quantize",
]


def operation(result: Callable[[Any], Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Return a decorator that registers a function as an operation of its name.

    `result` returns an empty tensor in the form of the operation's result, for tracing; it is called with an object that
    has the operation's arguments as attributes.
    """

    def register(function: Callable[..., Tensor]) -> Any:
        made = torch.library.custom_op(f"dqtool::{function.__name__}", function, mutates_args=())
        names = list(inspect.signature(function).parameters)
        made.register_fake(lambda *values: result(SimpleNamespace(**dict(zip(names, values, strict=True)))))
        return made

    return register


@operation(lambda a: empty_codes(a.x, a.shape))
def quantize(
    x: Tensor,
    steps: Tensor,
    multipliers: Tensor | None,
    divisor: Tensor | None,
    rows: Tensor,
    shape: list[int],
    sizes: list[int],
    image: bool,
    up: int,
    act: int,
) -> Tensor:
    """Return the codes `shape` of `act(x)`; `sizes` are the kernel's, of an image or of rows."""
    x = laid_out(x, image)
    data = torch.empty(shape, dtype=torch.uint8)
    units = sizes[0] if image else sizes[1]
    for start, stop, _, quantizer in quantized_runs(rows, units, steps, multipliers, divisor):
        part = (stop - start, *sizes[1:]) if image else (sizes[0], stop - start, *sizes[2:])
        kernels().dq_quantize(address(x, start, units), address(data, start, units), *part, up, act, *quantizer)
    return data


@operation(lambda a: empty_codes(a.x, a.shape))
def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    groups: int,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    act: int,
    steps: Tensor,
    multipliers: Tensor | None,
    divisor: Tensor | None,
    rows: Tensor,
    shape: list[int],
    sizes: list[int],
) -> Tensor:
    """Return the codes `shape` of `act(norm(x) * (1 + scale) + shift)`, of an image."""
    x = laid_out(x, True)
    data = torch.empty(shape, dtype=torch.uint8)
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    units = sizes[0]
    for start, stop, _, quantizer in quantized_runs(rows, units, steps, multipliers, divisor):
        kernels().dq_group_norm_quantize(
            address(x, start, units), address(data, start, units), stop - start, *sizes[1:], groups, eps, pointer(weight),
            pointer(bias), address(scale, start, units), address(shift, start, units), act, *quantizer,
        )  # fmt: skip
    return data


@operation(lambda a: empty_codes(a.x, (a.x.shape[0] * a.x.shape[1], a.channel_bytes)))
def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
    steps: Tensor,
    multipliers: Tensor | None,
    divisor: Tensor | None,
    rows: Tensor,
    channel_bytes: int,
) -> Tensor:
    """Return the codes `[N * S, channel_bytes]` of `norm(x) * (1 + scale) + shift`; `x` `[N, S, C]`, `scale`, `shift` `[N, C]`."""
    n, s, c = x.shape
    x = x.contiguous()
    scale, shift = (None if t is None else t.expand(n, -1).contiguous() for t in (scale, shift))
    data = torch.empty(n * s, channel_bytes, dtype=torch.uint8)
    for start, stop, _, quantizer in quantized_runs(rows, n, steps, multipliers, divisor):
        kernels().dq_layer_norm_quantize(
            address(x, start, n), address(data, start, n), stop - start, s, c, channel_bytes, eps, pointer(weight), pointer(bias),
            address(scale, start, n), address(shift, start, n), *quantizer,
        )  # fmt: skip
    return data


@operation(lambda a: empty_codes(a.x, (a.x.shape[0], a.channel_bytes)))
def geglu(
    x: Tensor,
    steps: Tensor,
    multipliers: Tensor | None,
    divisor: Tensor | None,
    rows: Tensor,
    channel_bytes: int,
) -> Tensor:
    """Return the codes `[rows, channel_bytes]` of `value * gelu(gate)`, `x` `[rows, 2 C]`."""
    units, width = x.shape
    x = x.contiguous()
    data = torch.empty(units, channel_bytes, dtype=torch.uint8)
    for start, stop, _, quantizer in quantized_runs(rows, units, steps, multipliers, divisor):
        kernels().dq_geglu_quantize(
            address(x, start, units), address(data, start, units), stop - start, width // 2, channel_bytes, *quantizer
        )
    return data


@operation(lambda a: empty_product(a.codes, Geometry(*a.geometry), a.shape))
def multiply(
    codes: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    scales: Tensor,
    own: Tensor | None,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    shape: list[int],
    geometry: list[int],
    post: float,
) -> Tensor:
    """Return `((product + bias) * gate + residual) * post`.

    The result is `[*shape, C_out]`, or of a convolution, whose `shape` is `(N, H, W)`, `[N, C_out, H, W]` channels-last. `own`
    `[C_out]` is the layer's bias, `bias` `[N, C_out]` replaces it, `gate` is `[N, C_out]`.
    """
    g = Geometry(*geometry)
    held = packed_weight(weight, sums, g, shape)
    out = empty_product(codes, g, shape)
    units, per_sample = shape[0], 0
    if bias is not None:
        bias, per_sample = bias.contiguous(), g.out_channels
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if g.is_conv else torch.contiguous_format)
    if gate is not None:
        gate = gate.expand(units, -1).contiguous()
    each = codes.shape[0] // units if units else 0  # rows of a linear layer's input for each sample
    pixels = each if not g.is_conv and (bias is not None or gate is not None) else 0
    for start, stop, row in runs_of_rows(rows, units):
        _, _, zero_point, scale = step_values(steps, row)
        add = pointer(own) if bias is None else address(bias, start, units)
        extra, result = address(residual, start, units), address(out, start, units)
        if g.is_conv:
            place = (stop - start, *codes.shape[1:], *shape[1:], g.out_channels)
        else:
            place = (1, 1, (stop - start) * each, g.channel_bytes, 1, (stop - start) * each, g.out_channels)
        inputs = (address(codes, start, units), pointer(held.packed), pointer(held.sums), None)
        if held.winograd:
            kernels().dq_winograd(
                *inputs,
                int(zero_point),
                g.largest_code,
                *place,
                pointer(scales),
                scale,
                add,
                per_sample,
                extra,
                post,
                result,
            )
            continue
        taps = geometry[4:10] if g.is_conv else (1,) * 6
        gated = (address(gate, start, units), 0 if gate is None else g.out_channels)
        kernels().dq_conv(
            *inputs, int(zero_point), g.largest_code, held.largest, *place, *taps, pointer(scales), scale, add,
            per_sample, pixels, *gated, extra, post, g.gates, result,
        )  # fmt: skip
    return out


@operation(lambda a: empty_codes(a.codes, (a.codes.shape[0], a.next_bytes)))
def linear_codes(
    codes: Tensor,
    weight: Tensor,
    sums: Tensor | None,
    scales: Tensor,
    own: Tensor | None,
    steps: Tensor,
    geometry: list[int],
    next_steps: Tensor,
    next_multipliers: Tensor | None,
    next_divisor: Tensor | None,
    rows: Tensor,
    next_bytes: int,
    act: int,
) -> Tensor:
    """Return the codes `[rows, next_bytes]` of `act(product)`, for the linear layer that comes next."""
    g = Geometry(*geometry)
    held = packed_weight(weight, sums, g, (1, 1, 1))
    units = codes.shape[0]
    data = torch.empty(units, next_bytes, dtype=torch.uint8)
    for start, stop, row, quantizer in quantized_runs(rows, units, next_steps, next_multipliers, next_divisor):
        _, _, zero_point, scale = step_values(steps, row)
        kernels().dq_linear_codes(
            address(codes, start, units), pointer(held.packed), pointer(held.sums), None, int(zero_point), g.largest_code,
            held.largest, stop - start, g.channel_bytes, g.out_channels, pointer(scales), scale, pointer(own), g.gates,
            address(data, start, units), next_bytes, act, *quantizer,
        )  # fmt: skip
    return data


@operation(lambda a: a.q.new_empty((a.q.shape[0], a.q.shape[2], a.q.shape[1] * a.q.shape[3])))
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tables: Tensor,
    scores: Tensor,
    results: Tensor,
    rows: Tensor,
) -> Tensor:
    """Return both products and the softmax of `[N, H, S, D]` operands, `[N, S, H * D]`.

    `IntegerAttnProcessor` makes `tables` `[T, 4, 3, H]`, `scores` and `results` `[T, H]` from the operands' step tables.
    """
    n, h, sq, d = q.shape
    sk = k.shape[2]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        mask = mask.expand(n, h, sq, sk)
        mask = mask if mask.stride(-1) == 1 or sk == 1 else mask.contiguous()
    out = torch.empty(n, sq, h * d)
    for start, stop, row in runs_of_rows(rows, n):
        row = row if len(tables) > 1 else 0
        operands: list[Any] = []
        for operand in (q, k, v):
            operands += [operand[start].data_ptr(), library.strides(operand)]
        place = (None, 0, 0, 0) if mask is None else (mask[start].data_ptr(), *mask.stride()[:3])
        kernels().dq_attention(
            *operands, stop - start, h, sq, sk, d, tables[row].data_ptr(), scores[row].data_ptr(),
            results[row].data_ptr(), *place, out[start].data_ptr(),
        )  # fmt: skip
    return out


@operation(lambda a: empty_product(a.codes, Geometry(*a.geometry), a.shape))
def onednn_multiply(
    codes: Tensor,
    weight: Tensor,
    prepacked: bool,
    scales: Tensor,
    zeros: Tensor,
    own: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    shape: list[int],
    geometry: list[int],
    groups: int,
) -> Tensor:
    """Return `product + own` from PyTorch's oneDNN operations, laid out as `multiply` lays it out."""
    g, ops = Geometry(*geometry), torch.ops.onednn
    stride, dilation = geometry[6:8], geometry[8:10]
    if not prepacked:
        held = PACKED.get(weight)
        if held is None:
            held = (
                ops.qconv_prepack(weight, scales, 1.0, 0, stride, [0, 0], dilation, groups, None)
                if g.is_conv
                else ops.qlinear_prepack(weight, None)
            )
            PACKED[weight] = held
        weight = held
    parts = []
    each = codes.shape[0] // shape[0]  # rows of a linear layer's input for each sample
    for start, stop, row in runs_of_rows(rows, shape[0]):
        _, _, zero_point, scale = step_values(steps, row)
        how = (scale, int(zero_point), weight, scales, zeros, own)
        end: Any = (1.0, 0, torch.float32, "none", [], "")
        if g.is_conv:
            part = codes[start:stop].permute(0, 3, 1, 2)
            parts.append(ops.qconv2d_pointwise(part, *how, stride, [0, 0], dilation, groups, *end))
        else:
            parts.append(ops.qlinear_pointwise(codes[start * each : stop * each], *how, *end))
    out = empty_product(codes, g, shape)
    whole = torch.cat(parts)
    return out.copy_(whole if g.is_conv else whole.view(out.shape))

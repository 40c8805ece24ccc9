"""The kernels as operations of PyTorch, `torch.ops.dqtool.gpu_*`, with the form of each result, so that no graph breaks.

An eager network calls the functions themselves (`call`), which costs less per layer. The step is a tensor on the device: `rows` is
`[1]`, or holds one row of the step tables for each sample. A new step compiles nothing and waits for nothing.

A quantizer is three arguments: `steps` `[T, 4]` (smallest and largest code, offset, scale), its divisor `[C]` or None, and `rows`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dqtool.runtimes.cuda.geometry import Geometry, Padding

__all__ = ["attention", "group_norm", "layer_norm", "linear_codes", "product", "quantize"]


def operation(result: Callable[[Any], Tensor]) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Return a decorator that registers a function as the operation `gpu_NAME`, which graphs call in its place.

    `result` returns an empty tensor in the form of the operation's result; it is called with an object that has the
    operation's arguments as attributes.
    """

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        made: Any = torch.library.custom_op(f"dqtool::gpu_{function.__name__}", function, mutates_args=())
        names = list(inspect.signature(function).parameters)
        made.register_fake(lambda *values: result(SimpleNamespace(**dict(zip(names, values, strict=True)))))

        def call(*values: Any) -> Tensor:
            found: Tensor = made(*values) if is_compiling() else function(*values)
            return found

        call.__doc__ = function.__doc__
        return call

    return register


def image_codes(x: Tensor, padding: list[int]) -> Tensor:
    """Return empty codes of an image."""
    p = Padding(*padding)
    return x.new_empty((x.shape[0], p.height, p.width_padded, p.groups * p.channel_bytes), dtype=torch.int8)


def empty_product(codes: Tensor, shape: list[int], geometry: list[int], dtype: torch.dtype) -> Tensor:
    """Return an empty result: `[*shape, C_out]`, which is an image's channels-last memory."""
    return codes.new_empty((*shape, Geometry(*geometry).out_channels), dtype=dtype)


@operation(lambda a: image_codes(a.x, a.padding))
def quantize(x: Tensor, steps: Tensor, divisor: Tensor | None, rows: Tensor, padding: list[int], act: int) -> Tensor:
    """Codes `[N, HP, WP, C]` of `act(x)`, `x` `[N, C, H, W]` of any strides."""
    from dqtool.runtimes.cuda.launch import quantize_image

    return quantize_image(x, steps, divisor, rows, Padding(*padding), act)


@operation(lambda a: image_codes(a.x, a.padding))
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
    divisor: Tensor | None,
    rows: Tensor,
    padding: list[int],
) -> Tensor:
    """Codes `[N, HP, WP, C]` of `act(norm(x) * (1 + scale) + shift)`; `scale`, `shift` are `[N, C]`."""
    from dqtool.runtimes.cuda.launch import quantize_image

    if scale is not None and shift is not None:
        scale, shift = (t.expand(len(x), -1).contiguous() for t in (scale, shift))
    norm = (groups, weight, bias, eps)
    return quantize_image(x, steps, divisor, rows, Padding(*padding), act, norm, scale, shift)


@operation(lambda a: a.x.new_empty((a.x.shape[0] * a.x.shape[1], a.channel_bytes), dtype=torch.int8))
def layer_norm(
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
    """Codes `[N * S, channel_bytes]` of `norm(x) * (1 + scale) + shift`, `x` `[N, S, C]`, `scale` and `shift` `[N, C]`."""
    from dqtool.runtimes.cuda.launch import layer_norm_codes

    return layer_norm_codes(x, weight, bias, eps, scale, shift, steps, divisor, rows, channel_bytes)


@operation(lambda a: empty_product(a.codes, a.shape, a.geometry, a.dtype))
def product(
    codes: Tensor,
    planes: Tensor,
    zeros: Tensor,
    sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    shape: list[int],
    geometry: list[int],
    post: float,
    dtype: torch.dtype,
) -> Tensor:
    """`((product + bias) * gate + residual) * post`, `[*shape, C_out]`. `bias` is `[C_out]` or `[N, C_out]`, `gate` `[N, C_out]`."""
    from dqtool.runtimes.cuda.launch import multiply_codes

    bias = bias.contiguous() if bias is not None else None
    if gate is not None:
        gate = gate.expand(shape[0], -1)
        gate = gate if gate.stride(1) == 1 else gate.contiguous()
    residual = residual.contiguous() if residual is not None else None
    weight, out = (planes, zeros, sums, scales), empty_product(codes, shape, geometry, dtype)
    g = Geometry(*geometry)
    return multiply_codes(codes, weight, bias, gate, residual, steps, rows, tuple(shape), g, out, post)


@operation(lambda a: a.codes.new_empty((a.codes.shape[0], a.next_bytes)))
def linear_codes(
    codes: Tensor,
    planes: Tensor,
    zeros: Tensor,
    sums: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    steps: Tensor,
    rows: Tensor,
    shape: list[int],
    geometry: list[int],
    next_steps: Tensor,
    next_divisor: Tensor | None,
    next_bytes: int,
    act: int,
) -> Tensor:
    """Codes `[rows, next_bytes]`, for the linear layer that comes next, of `act(product)`."""
    from dqtool.runtimes.cuda.launch import multiply_codes

    weight, out = (planes, zeros, sums, scales), codes.new_empty((codes.shape[0], next_bytes))
    following = (next_steps, next_divisor)
    g, no = Geometry(*geometry), None
    return multiply_codes(codes, weight, bias, no, no, steps, rows, tuple(shape), g, out, 1.0, following, act)


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
    factor: float,
    largest: int,
) -> Tensor:
    """Both products and the softmax of `[N, H, S, D]` operands, `[N, S, H * D]`, with the tensors of `AttentionTables`.

    `factor` multiplies the scores, `largest` is the largest code of a probability. Half precision takes the place of int8 where it
    is faster, see `attention_choice.py`.
    """
    from dqtool.runtimes.cuda.attention_choice import half_is_faster, half_precision
    from dqtool.runtimes.cuda.launch import attend

    def int8() -> Tensor:
        return attend((q, k, v), mask, tables, scores, results, rows, factor, largest)

    def half() -> Tensor:
        return half_precision(q, k, v, mask, factor)

    return half() if half_is_faster(q, k, mask, int8, half) else int8()

"""The kernels as operations of PyTorch, `torch.ops.dqtool.*`: what `torch.compile` and `torch.export` put into a graph.

An eager network calls the kernels itself, which costs less per layer; while it is traced, `codes.py`, `products.py` and
`attention.py` call these. Each has a fake implementation, so that no graph breaks, and takes the step as a tensor, so that
a new step compiles nothing: `rows` is `[1]`, or holds one row of the step tables for each sample.

`steps` `[T, 4]` are a layer's smallest and largest centred code, zero point and scale at each step. A quantizer is four
arguments: `steps`, its multipliers `[T]` or `[T, C]` (None where that table would be large), its divisor `[C]` or None, and
`rows`. A weight is two tensors, in the form that `geometry` names (`Geometry`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dqtool.errors import EnvironmentFault
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.layout import PackedWeight, pack_weight, worth_winograd
from dqtool.runtimes.cpu.library import pointer

__all__ = [
    "KERNEL_LAYOUT",
    "WINOGRAD_LAYOUT",
    "Geometry",
    "attention",
    "geglu",
    "group_norm",
    "layer_norm",
    "linear_codes",
    "multiply",
    "onednn_multiply",
    "quantize",
]

KERNEL_LAYOUT, WINOGRAD_LAYOUT, INT8 = 0, -1, -2
"""Forms of a weight: as the kernels read it, the same transformed, and plain int8 codes. A positive form is a number of
bits: packed words with their zero points."""


class Geometry(NamedTuple):
    """Integer arguments of a product's operation, passed as one list."""

    out_channels: int
    in_channels: int
    channel_bytes: int
    is_conv: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    gates: int = 0
    largest_code: int = 255
    may_winograd: int = 0
    form: int = INT8
    """`KERNEL_LAYOUT`, `WINOGRAD_LAYOUT`, `INT8`, or the bits of packed words."""
    largest_weight: int = 128
    machine: int = 0
    """`library.layout_of_machine` where the weight is in a layout of the kernels."""


_packed: Any = WeakTensorKeyDictionary()
"""Weights that came as codes, in the kernels' layout, for as long as the codes live."""


@torch.library.custom_op("dqtool::quantize", mutates_args=())
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
    """Codes `shape` of `act(x)`; `sizes` are the kernel's, of an image or of rows."""
    x = _laid_out(x, image)
    data = torch.empty(shape, dtype=torch.uint8)
    units = sizes[0] if image else sizes[1]
    for start, stop, row in _runs(rows, units):
        part = (stop - start, *sizes[1:]) if image else (sizes[0], stop - start, *sizes[2:])
        held, quantizer = _quantizer(steps, multipliers, divisor, row)
        _kernels().dq_quantize(_at(x, start, units), _at(data, start, units), *part, up, act, *quantizer)
        del held
    return data


@torch.library.custom_op("dqtool::group_norm", mutates_args=())
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
    """Codes `shape` of `act(norm(x) * (1 + scale) + shift)`, of an image."""
    x = _laid_out(x, True)
    data = torch.empty(shape, dtype=torch.uint8)
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    units = sizes[0]
    for start, stop, row in _runs(rows, units):
        held, quantizer = _quantizer(steps, multipliers, divisor, row)
        _kernels().dq_group_norm_quantize(
            _at(x, start, units), _at(data, start, units), stop - start, *sizes[1:], groups, eps, pointer(weight),
            pointer(bias), _at(scale, start, units), _at(shift, start, units), act, *quantizer,
        )  # fmt: skip
        del held
    return data


@torch.library.custom_op("dqtool::layer_norm", mutates_args=())
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
    """Codes `[N * S, channel_bytes]` of `norm(x) * (1 + scale) + shift`, `x` `[N, S, C]`, `scale` and `shift` `[N, C]`."""
    n, s, c = x.shape
    x = x.contiguous()
    scale, shift = (None if t is None else t.expand(n, -1).contiguous() for t in (scale, shift))
    data = torch.empty(n * s, channel_bytes, dtype=torch.uint8)
    for start, stop, row in _runs(rows, n):
        held, quantizer = _quantizer(steps, multipliers, divisor, row)
        _kernels().dq_layer_norm_quantize(
            _at(x, start, n), _at(data, start, n), stop - start, s, c, channel_bytes, eps, pointer(weight), pointer(bias),
            _at(scale, start, n), _at(shift, start, n), *quantizer,
        )  # fmt: skip
        del held
    return data


@torch.library.custom_op("dqtool::geglu", mutates_args=())
def geglu(
    x: Tensor,
    steps: Tensor,
    multipliers: Tensor | None,
    divisor: Tensor | None,
    rows: Tensor,
    channel_bytes: int,
) -> Tensor:
    """Codes `[rows, channel_bytes]` of `value * gelu(gate)`, `x` `[rows, 2 C]`."""
    units, width = x.shape
    x = x.contiguous()
    data = torch.empty(units, channel_bytes, dtype=torch.uint8)
    for start, stop, row in _runs(rows, units):
        held, quantizer = _quantizer(steps, multipliers, divisor, row)
        _kernels().dq_geglu_quantize(
            _at(x, start, units), _at(data, start, units), stop - start, width // 2, channel_bytes, *quantizer
        )
        del held
    return data


@torch.library.custom_op("dqtool::multiply", mutates_args=())
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
    """`((product + bias) * gate + residual) * post`, `[*shape, C_out]`, or channels-last `[N, C_out, H, W]` where `shape` is
    `(N, H, W)`. `own` `[C_out]` is the layer's bias, `bias` `[N, C_out]` stands in for it, `gate` is `[N, C_out]`."""
    g = Geometry(*geometry)
    held = _held(weight, sums, g, shape)
    out = _product_like(codes, g, shape)
    units, per_sample = shape[0], 0
    if bias is not None:
        bias, per_sample = bias.contiguous(), g.out_channels
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last if g.is_conv else torch.contiguous_format)
    if gate is not None:
        gate = gate.expand(units, -1).contiguous()
    each = codes.shape[0] // units if units else 0  # rows of a linear layer's input for each sample
    pixels = each if not g.is_conv and (bias is not None or gate is not None) else 0
    for start, stop, row in _runs(rows, units):
        _, _, zero_point, scale = _step(steps, row)
        add = pointer(own) if bias is None else _at(bias, start, units)
        extra, result = _at(residual, start, units), _at(out, start, units)
        if g.is_conv:
            place = (stop - start, *codes.shape[1:], *shape[1:], g.out_channels)
        else:
            place = (1, 1, (stop - start) * each, g.channel_bytes, 1, (stop - start) * each, g.out_channels)
        inputs = (_at(codes, start, units), pointer(held.packed), pointer(held.sums))
        if held.winograd:
            _kernels().dq_winograd(*inputs, *place, pointer(scales), scale, add, per_sample, extra, post, result)
            continue
        taps = geometry[4:10] if g.is_conv else (1,) * 6
        gated = (_at(gate, start, units), 0 if gate is None else g.out_channels)
        _kernels().dq_conv(
            *inputs, int(zero_point), g.largest_code, held.largest, *place, *taps, pointer(scales), scale, add,
            per_sample, pixels, *gated, extra, post, g.gates, result,
        )  # fmt: skip
    return out


@torch.library.custom_op("dqtool::linear_codes", mutates_args=())
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
    """Codes `[rows, next_bytes]`, for the linear layer that comes next, of `act(product)`."""
    g = Geometry(*geometry)
    held = _held(weight, sums, g, (1, 1, 1))
    units = codes.shape[0]
    data = torch.empty(units, next_bytes, dtype=torch.uint8)
    for start, stop, row in _runs(rows, units):
        _, _, zero_point, scale = _step(steps, row)
        kept, quantizer = _quantizer(next_steps, next_multipliers, next_divisor, row)
        _kernels().dq_linear_codes(
            _at(codes, start, units), pointer(held.packed), pointer(held.sums), int(zero_point), g.largest_code,
            held.largest, stop - start, g.channel_bytes, g.out_channels, pointer(scales), scale, pointer(own), g.gates,
            _at(data, start, units), next_bytes, act, *quantizer,
        )  # fmt: skip
        del kept
    return data


@torch.library.custom_op("dqtool::attention", mutates_args=())
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
    """Both products and the softmax of `[N, H, S, D]` operands, `[N, S, H * D]`. `tables` `[T, 4, 3, H]`, `scores` and
    `results` `[T, H]` are what `IntegerAttnProcessor` makes of the operands' tables."""
    n, h, sq, d = q.shape
    sk = k.shape[2]
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        mask = mask.expand(n, h, sq, sk)
        mask = mask if mask.stride(-1) == 1 or sk == 1 else mask.contiguous()
    out = torch.empty(n, sq, h * d)
    for start, stop, row in _runs(rows, n):
        row = row if len(tables) > 1 else 0
        operands: list[Any] = []
        for operand in (q, k, v):
            operands += [operand[start].data_ptr(), library.strides(operand)]
        place = (None, 0, 0, 0) if mask is None else (mask[start].data_ptr(), *mask.stride()[:3])
        _kernels().dq_attention(
            *operands, stop - start, h, sq, sk, d, tables[row].data_ptr(), scores[row].data_ptr(),
            results[row].data_ptr(), *place, out[start].data_ptr(),
        )  # fmt: skip
    return out


@torch.library.custom_op("dqtool::onednn_multiply", mutates_args=())
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
    """`product + own` on PyTorch's oneDNN operations, laid out as `multiply`'s."""
    g, ops = Geometry(*geometry), torch.ops.onednn
    stride, dilation = geometry[6:8], geometry[8:10]
    if not prepacked:
        held = _packed.get(weight)
        if held is None:
            held = (
                ops.qconv_prepack(weight, scales, 1.0, 0, stride, [0, 0], dilation, groups, None)
                if g.is_conv
                else ops.qlinear_prepack(weight, None)
            )
            _packed[weight] = held
        weight = held
    parts = []
    each = codes.shape[0] // shape[0]  # rows of a linear layer's input for each sample
    for start, stop, row in _runs(rows, shape[0]):
        _, _, zero_point, scale = _step(steps, row)
        how = (scale, int(zero_point), weight, scales, zeros, own)
        end: Any = (1.0, 0, torch.float32, "none", [], "")
        if g.is_conv:
            part = codes[start:stop].permute(0, 3, 1, 2)
            parts.append(ops.qconv2d_pointwise(part, *how, stride, [0, 0], dilation, groups, *end))
        else:
            parts.append(ops.qlinear_pointwise(codes[start * each : stop * each], *how, *end))
    out = _product_like(codes, g, shape)
    whole = torch.cat(parts)
    return out.copy_(whole if g.is_conv else whole.view(out.shape))


@quantize.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    *_, shape, _sizes, _image, _up, _act = rest
    return x.new_empty(shape, dtype=torch.uint8)


@group_norm.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    *_, shape, _sizes = rest
    return x.new_empty(shape, dtype=torch.uint8)


@layer_norm.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0] * x.shape[1], rest[-1]), dtype=torch.uint8)


@geglu.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((x.shape[0], rest[-1]), dtype=torch.uint8)


@multiply.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    *_, shape, geometry, _post = rest
    return _product_like(codes, Geometry(*geometry), shape)


@linear_codes.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    *_, next_bytes, _act = rest
    return codes.new_empty((codes.shape[0], next_bytes))


@attention.register_fake
def _(q: Tensor, *_rest: Any) -> Tensor:
    n, h, s, d = q.shape
    return q.new_empty((n, s, h * d))


@onednn_multiply.register_fake
def _(codes: Tensor, *rest: Any) -> Tensor:
    *_, shape, geometry, _groups = rest
    return _product_like(codes, Geometry(*geometry), shape)


def _product_like(codes: Tensor, g: Geometry, shape: list[int]) -> Tensor:
    """An empty result."""
    if not g.is_conv:
        return codes.new_empty((*shape, g.out_channels), dtype=torch.float32)
    n, h, w = shape
    return torch.empty(
        (n, g.out_channels, h, w), dtype=torch.float32, device=codes.device, memory_format=torch.channels_last
    )


def _kernels() -> Any:
    """The compiled kernels, which a program exported elsewhere may find missing here."""
    kernels = library.get()
    if kernels is None:
        raise EnvironmentFault(
            f"This graph needs dqtool's kernels, and they are missing: {library.problem()}", where="torch.ops.dqtool"
        )
    return kernels


def _runs(rows: Tensor, units: int) -> Iterator[tuple[int, int, int]]:
    """Runs (start, stop, row) of neighbours with the same row among `units` samples; each of `rows` is for as many of them. A
    layer whose input has no batch takes the first row."""
    values = rows.tolist()
    values = values[:1] if units % len(values) else values
    each, start = units // len(values), 0
    for row, group in groupby(values):
        stop = start + each * len(list(group))
        yield start, stop, row
        start = stop


def _step(steps: Tensor, row: int) -> list[float]:
    """Smallest code, largest code, zero point and scale; a static quantizer has one row."""
    found: list[float] = steps[row if len(steps) > 1 else 0].tolist()
    return found


def _quantizer(
    steps: Tensor, multipliers: Tensor | None, divisor: Tensor | None, row: int
) -> tuple[Tensor, tuple[int, int, float, float, int]]:
    """The multiplier, and the kernels' five arguments of which it is the first by address."""
    low, high, zero_point, scale = _step(steps, row)
    if multipliers is not None:
        m = multipliers[row if len(multipliers) > 1 else 0]
    else:
        m = torch.tensor(scale) if divisor is None else torch.tensor(scale) * divisor
        m = m.reciprocal()
    return m, (m.data_ptr(), m.dim(), low, high, int(zero_point))


def _at(t: Tensor | None, start: int, units: int) -> int | None:
    """Address of the unit `start` of the `units` that a dense tensor holds."""
    if t is None or not units:
        return pointer(t)
    return t.data_ptr() + start * (t.numel() // units) * t.element_size()


def _laid_out(x: Tensor, image: bool) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)


def _held(weight: Tensor, sums: Tensor | None, g: Geometry, shape: list[int] | tuple[int, ...]) -> PackedWeight:
    """The weight in the kernels' layout, packed at its first use where it came as codes.

    Raises:
        EnvironmentFault: it came in the layout of another kind of processor.
    """
    if g.form in (KERNEL_LAYOUT, WINOGRAD_LAYOUT):
        if g.machine != library.layout_of_machine(g.channel_bytes):
            raise EnvironmentFault(
                "This graph was exported after its network had run, and holds weights in the layout of another kind of "
                "processor",
                where="torch.ops.dqtool.multiply",
                fix="Export the network before its first call",
            )
        assert sums is not None
        return PackedWeight(weight, sums, g.form == WINOGRAD_LAYOUT, g.largest_weight)
    known = _packed.get(weight)
    if known is None or known[0] != g.gates:
        wanted = bool(g.may_winograd) and worth_winograd(g.out_channels, g.in_channels, tuple(shape))
        sizes = (g.out_channels, g.in_channels, g.kernel_h * g.kernel_w, g.channel_bytes)
        bits = 8 if g.form == INT8 else g.form
        known = (g.gates, pack_weight(weight, None if g.form == INT8 else sums, bits, sizes, g.gates, wanted))
        _packed[weight] = known
    held: PackedWeight = known[1]
    return held

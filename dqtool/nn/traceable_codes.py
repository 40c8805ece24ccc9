"""Codes of operands in a traceable network, the step tables that they come from, and the form of their products.

A quantized operand becomes multiply, round, clip, and a fake-quantize on the constant grid -128..127 (0..255 for unsigned
codes). The fake-quantize says "int8" to a compiler and changes nothing. A weight is an int8 constant, converted and
multiplied with its scale. Compilers recognise both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.nn.integer import IntegerLayer, Operand
from dqtool.nn.steps import nearest_rows

__all__ = ["OperandCodes", "ProductForm", "StepTables", "is_signed", "largest_code", "multiply"]


class ProductForm:
    """Form in which integer products are written into the graph. Engines override it for their compiler.

    With `folds_norms` group norms become `TraceableGroupNorm`.
    """

    folds_norms = False

    def fits(self, left: Operand, right: int) -> bool:
        """Return whether the engine's sums are exact for codes of `left` times int8 codes of magnitude up to `right`."""
        return True

    def mark(self, codes: Tensor, signed: bool) -> Tensor:
        """Return `codes` (integers in float) with a fake-quantize operation that marks them as int8 or uint8."""
        low, high = (-128, 127) if signed else (0, 255)
        return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, low, high)

    def layer(self, codes: Tensor, weight: Tensor, weight_scale: Tensor, layer: IntegerLayer) -> Tensor:
        """Return `weight_scale_j * sum(c * w)` of a convolution or linear layer; unsigned codes are padded already."""
        w = weight.to(torch.float32) * weight_scale.view(-1, *(1,) * (weight.dim() - 1))
        return multiply(codes, w, layer, None, padded=not is_signed(layer))

    def matmul(self, a: Tensor, b: Tensor, signed: bool) -> Tensor:
        """Return the product of two marked attention operands; `signed` says whether `a` is signed, and `b` always is."""
        return a @ b


class StepTables(nn.Module):
    """The tables of all layers side by side, so that one gather per call serves the whole network.

    A slot is `[n, width]` during a call: `n` is 1, or the batch where samples are at different steps.
    """

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        self.timesteps = nn.Buffer(timesteps.detach().to(torch.float32))
        self.table = nn.Buffer(torch.empty(0))
        self.divisors = nn.Buffer(torch.empty(0))
        self.owners = nn.Buffer(torch.empty(0, dtype=torch.long))
        self._columns: list[Tensor] = []
        self._divided: list[tuple[int, Tensor]] = []  # (column of the scale, divisor)
        self._known: dict[bytes, int] = {}
        self._now: list[Tensor] = []
        self._now_divided: list[Tensor] = []
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def add(self, table: Tensor) -> int:
        """Reserve a slot for `table` `[T]` or `[T, width]` (or one static row) and return its index; equal tables share one."""
        rows = table.detach().to(torch.float32).reshape(table.shape[0], -1).expand(len(self.timesteps), -1).contiguous()
        key = rows.numpy().tobytes()
        if key not in self._known:
            self._known[key] = len(self._columns)
            self._columns.append(rows)
        return self._known[key]

    def add_divided(self, scale: Tensor, divisor: Tensor) -> int:
        """Reserve a slot for the multipliers `1 / (scale_t * divisor_k)` `[n, K]` and return its index.

        They are computed in each call, because tables of them would be K times larger.
        """
        key = b"divided" + scale.numpy().tobytes() + divisor.numpy().tobytes()
        if key not in self._known:
            self._known[key] = len(self._divided)
            self._divided.append((self.add(scale), divisor.detach().to(torch.float32)))
        return self._known[key]

    def freeze(self) -> None:
        """Lay the tables out in memory; no slot can be added afterwards."""
        starts, at = [], 0
        for column in self._columns:
            starts.append(at)
            at += column.shape[1]
        if self._columns:
            self.table = nn.Buffer(torch.cat(self._columns, 1))
        if self._divided:
            self.divisors = nn.Buffer(torch.cat([divisor for _, divisor in self._divided]))
            self.owners = nn.Buffer(
                torch.cat([torch.full((len(divisor),), starts[column]) for column, divisor in self._divided])
            )

    def enter(self, timestep: Tensor) -> None:
        """Gather the rows nearest to `timestep` `[n]`."""
        self._made = {}
        rows = nearest_rows(timestep.to(torch.float32), self.timesteps)
        if not self._columns:
            return
        row = self.table[rows]  # [n, all widths]
        self._now = list(row.split([column.shape[1] for column in self._columns], 1))
        if self._divided:
            multipliers = torch.ones(1) / (row[:, self.owners] * self.divisors)
            self._now_divided = list(multipliers.split([divisor.numel() for _, divisor in self._divided], 1))

    def made(self, key: tuple[Any, ...], x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` makes of `x`, once in each call; `key` holds the identity of `x`, which is kept alive."""
        if key not in self._made:
            self._made[key] = (x, make())
        return self._made[key][1]

    def leave(self) -> None:
        """Release the rows and codes of this call."""
        self._now, self._now_divided, self._made = [], [], {}


class OperandCodes:
    """Quantizer of one operand in the graph: turns it into marked codes by the rows of its slots.

    Layers that share an input and its quantizer (q, k, v) share codes, which are computed once per call. Without a
    `product` codes are not marked: they are centred integers in float, of any width.
    """

    def __init__(self, operand: Operand, tables: StepTables, product: ProductForm | None) -> None:
        self.signed, self.divided = operand.signed or product is None, operand.divisor is not None
        self.tables, self.product = tables, product
        if operand.divisor is None:
            self.multiplier = tables.add(operand.multipliers())
        else:
            self.multiplier = tables.add_divided(operand.scale, operand.divisor)
        self.static_zero = bool((operand.zero_point == operand.zero_point.flatten()[0]).all())
        self.bounds = (int(operand.low.flatten()[0]), int(operand.high.flatten()[0]))
        self.low, self.high = tables.add(operand.low), tables.add(operand.high)
        self.scale, self.zero_point = tables.add(operand.scale), tables.add(operand.zero_point)
        self.rows = (-1, operand.scale[0].numel(), 1, 1)  # per-head tables against [N, H, S, D]

    def slot(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Return the slot's rows of the current call, viewed as `shape`."""
        return self.tables._now[slot].view(shape)

    def __call__(self, x: Tensor, shape: tuple[int, ...], pad: tuple[int, ...] = ()) -> Tensor:
        """Return the codes of `x`: centred if `signed`, else stored codes.

        `shape` views rows `[n, width]` so that they broadcast against `x`. `pad` pads `x` with real zeros first, since
        unsigned codes can't be padded with zero afterwards.
        """
        key = (id(x), self.multiplier, self.divided, self.low, self.high, self.signed, self.product is None, pad)
        return self.tables.made(key, x, lambda: self._codes(F.pad(x, pad) if any(pad) else x, shape))

    def _codes(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        source = self.tables._now_divided if self.divided else self.tables._now
        scalar = (shape[0], *(1,) * (len(shape) - 1)) if self.divided else shape
        codes = (x * source[self.multiplier].view(shape)).round()
        if self.static_zero:
            codes = codes.clamp(*self.bounds)
        else:
            codes = torch.maximum(codes, self.slot(self.low, scalar))
            codes = torch.minimum(codes, self.slot(self.high, scalar))
        if not self.signed:
            codes = codes + self.slot(self.zero_point, scalar)
        return codes if self.product is None else self.product.mark(codes, self.signed)


def largest_code(operand: Operand) -> int:
    """Return the largest magnitude of an operand's centred codes."""
    return int(torch.maximum(-operand.low, operand.high).max())


def is_signed(layer: IntegerLayer) -> bool:
    """Return whether the layer's input codes are centred."""
    return layer.input is None or layer.input.signed


def multiply(x: Tensor, weight: Tensor, layer: IntegerLayer, bias: Tensor | None, padded: bool = False) -> Tensor:
    """Return the float convolution or linear product with a layer's geometry; with `padded`, `x` is padded already."""
    if not layer.is_conv:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, 0 if padded else layer.padding, layer.taps_dilation, layer.groups)

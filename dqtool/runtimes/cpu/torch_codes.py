"""Codes of a product's input in PyTorch's own operations: what is left without a C++ compiler."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

__all__ = ["torch_codes"]


def torch_codes(layer: Any, x: Tensor, extra: tuple[int, int] = (0, 0)) -> tuple[Tensor, tuple[int, ...]]:
    """Return what `quantize` of the product `layer` does for a float input: the codes, and the result's leading shape."""
    if is_compiling():
        return _traced(layer, x, extra)
    row = layer.row
    zero_point = layer.zero_point()
    m = layer.operand.multiplier(row)
    if layer.is_conv and m.dim():
        m = m.view(-1, 1, 1)
    codes = (x * m).round_().clamp_(layer.lows[row], layer.highs[row]).add_(zero_point).to(torch.uint8)
    spare = layer.channel_bytes - layer.in_channels
    if not layer.is_conv:
        codes = F.pad(codes, (0, spare)) if spare else codes
        return (codes.reshape(-1, layer.channel_bytes), tuple(x.shape[:-1]))
    full = (x.shape[2] + extra[0], x.shape[3] + extra[1])
    top, bottom, left, right = layer.padding_of(*full)
    codes = F.pad(codes.permute(0, 2, 3, 1), (0, 0, left, right + extra[1], top, bottom + extra[0]), value=zero_point)
    codes = F.pad(codes, (0, spare)) if spare else codes
    return (codes.contiguous(), (x.shape[0], *layer._out_size(*full)))


def _traced(layer: Any, x: Tensor, extra: tuple[int, int]) -> tuple[Tensor, tuple[int, ...]]:
    """Return what `torch_codes` does for rows that are known when the graph runs."""
    rows = layer.current_step.rows if len(layer.steps) > 1 else layer.current_step.rows[:1] * 0
    batch = x.shape[0]
    rows = rows[:1] if batch % len(rows) else rows.repeat_interleave(batch // len(rows))
    shape = (-1, *(1,) * (x.dim() - 1))
    low, high, zero_point, scale = (t.view(shape) for t in layer.steps[rows].unbind(1))
    divisor = layer.operand.divisor
    if divisor is not None:
        scale = scale * (divisor.view(-1, 1, 1) if layer.is_conv else divisor)
    codes = (x * scale.reciprocal()).round().maximum(low).minimum(high)
    spare = layer.channel_bytes - layer.in_channels
    if not layer.is_conv:
        data = F.pad((codes + zero_point).to(torch.uint8), (0, spare))
        return (data.reshape(-1, layer.channel_bytes), tuple(x.shape[:-1]))
    full = (x.shape[2] + extra[0], x.shape[3] + extra[1])
    top, bottom, left, right = layer.padding_of(*full)
    codes = F.pad(codes, (left, right + extra[1], top, bottom + extra[0])) + zero_point  # centred codes pad with zero
    data = F.pad(codes.to(torch.uint8).permute(0, 2, 3, 1), (0, spare)).contiguous()
    return (data, (batch, *layer._out_size(*full)))

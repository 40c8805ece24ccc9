"""Quantization of weights once for all parts of a batch: one-byte codes are kept and expanded where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.core.affine import centred_codes
from dqtool.nn.layers import FakeQuantLayer

__all__ = ["held_weights"]


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Quantize the trainable weights of `model` once, for all forward passes inside the context.

    When the context ends, the gradients summed over all passes go through the quantizer once. The quantizer's gradient
    is linear in its incoming gradient, so the result equals that of separate passes up to rounding. Gradients must be
    allocated and zero when the context begins.
    """
    held = [layer for layer in model.modules() if isinstance(layer, FakeQuantLayer) and _can_hold(layer)]
    for layer in held:
        layer.quantized_weight = partial(_expanded, layer, *_codes(layer))  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in held:
            del layer.__dict__["quantized_weight"]
    for layer in held:
        assert layer.weight.grad is not None
        summed = layer.weight.grad.clone()
        layer.weight.grad.zero_()
        layer.quantized_weight().backward(summed)


def _can_hold(layer: FakeQuantLayer) -> bool:
    """Return whether a layer's weight learns and is quantized without an adapter or learned scaling."""
    plain = layer.adapter is None and layer.learned is None and layer.weight_scale is not None
    return plain and layer.weight.requires_grad and layer.weight.grad is not None


@torch.no_grad()
def _codes(layer: FakeQuantLayer) -> tuple[Tensor, Tensor]:
    """Return the centred codes, int8 in the weight's shape, and the scale that broadcasts against them.

    All codes fit into int8, because the 8-bit grid is symmetric.
    """
    assert layer.weight_scale is not None
    assert layer.weight_zero_point is not None
    shape = (-1, *(1,) * (layer.weight.dim() - 1))
    scale, zero_point = (t.detach().view(shape) for t in (layer.weight_scale, layer.weight_zero_point))
    codes = centred_codes(layer.weight, scale, zero_point, layer.bits.weight, layer.low)
    return codes.to(torch.int8), scale


def _expanded(layer: FakeQuantLayer, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the quantized weight of these codes, with a gradient to the float weight where gradients are enabled."""
    if not torch.is_grad_enabled():
        return codes * scale
    expanded: Tensor = _Expand.apply(layer.weight, codes, scale)  # type: ignore[no-untyped-call]
    return expanded


class _Expand(torch.autograd.Function):
    """`scale * codes` with the identity as the gradient of the weight that the codes belong to."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None, None

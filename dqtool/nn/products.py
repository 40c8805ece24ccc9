"""Quantized operands for every `scaled_dot_product_attention` that a module calls in its own way (`graph/products.py`).

The module's forward runs unchanged. Its call of the products is intercepted, and its processor of dqtool computes both of
them on quantized operands, as it does for diffusers' own attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dqtool.graph.attention import own_processor
from dqtool.nn.call_lock import give

__all__ = ["intercept_products", "release_products"]

MASKED = -1e30
"""Score of a masked key: finite, so that a query without any key gives numbers, which are then set to zero."""


def intercept_products(module: nn.Module) -> None:
    """Let the processor of dqtool in `module` compute the products that the module's forward calls."""
    give(module, "forward", _forward)


def release_products(module: nn.Module) -> None:
    """Undo `intercept_products`."""
    module.__dict__.pop("forward", None)


class _Products(TorchFunctionMode):
    """Computes calls of `scaled_dot_product_attention` by the processor of one module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(self.module, *args, **(kwargs or {}))
        if func is Tensor.unflatten and torch.compiler.is_compiling():
            return _unflatten(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _unflatten(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """Return `x.unflatten(dim, sizes)`, whose Python part a compiler can't trace inside of a mode."""
    dim = dim % x.dim()
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def _forward(module: Any, *args: Any, **kwargs: Any) -> Any:
    with _Products(module):
        return type(module).forward(module, *args, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute attention as `F.scaled_dot_product_attention` does, `[N, H, S, D]` each, by the module's processor."""
    heads = query.shape[1]
    if key.shape[1] != heads:  # one key head serves several query heads
        key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    alone = None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        alone = ~attn_mask.any(-1, keepdim=True)
        attn_mask = torch.where(attn_mask, 0.0, MASKED)
    elif attn_mask is not None:
        attn_mask = attn_mask.float().clamp(min=MASKED)
    while attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask.unsqueeze(0)
    mixed: Tensor = own_processor(module).attend(module, query, key, value, attn_mask, scale)
    mixed = mixed.unflatten(2, (heads, -1)).transpose(1, 2)
    return mixed if alone is None else mixed.masked_fill(alone, 0.0)

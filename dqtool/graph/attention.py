"""Recognize diffusers attention modules whose two products can be quantized, by their interface: diffusers is not imported."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["OWN", "PRODUCTS", "attention_layout", "is_attention", "own_processor"]

OWN = "_dqtool_processor"
"""Key of a module's `__dict__` that holds its processor of dqtool."""

PRODUCTS = "products"
"""Layout of a module whose calls of `scaled_dot_product_attention` are quantized whatever surrounds them."""

LAYOUTS = {
    "AttnProcessor": "single",
    "AttnProcessor2_0": "single",
    "JointAttnProcessor2_0": "joint",
    "FluxAttnProcessor": "flux",
}
"""Computation that each diffusers processor class performs: one stream (self- or cross-attention), the two streams of SD3,
or the two streams of Flux with rotary embeddings."""


def attention_layout(module: nn.Module) -> str | None:
    """Return the computation that an attention module performs ("single", "joint", "flux" or `PRODUCTS`).

    It is read from the module's processor; a processor of dqtool states it as its attribute `layout`. None marks an unknown
    processor.
    """
    own = module.__dict__.get(OWN)
    if own is not None and own.layout == PRODUCTS:
        return PRODUCTS
    processor = getattr(module, "processor", None)
    stated = getattr(processor, "layout", None)
    return stated if stated in LAYOUTS.values() else LAYOUTS.get(type(processor).__name__)


def is_attention(module: nn.Module) -> bool:
    """Say whether `module` is an attention module of diffusers with a known layout, or one whose products are quantized."""
    layout = attention_layout(module)
    if layout == PRODUCTS:
        return True
    named = all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "heads", "set_processor"))
    return named and layout is not None


def own_processor(module: nn.Module) -> Any:
    """Return the processor of dqtool in a module, or the module's processor where it has none."""
    return module.__dict__.get(OWN, getattr(module, "processor", None))

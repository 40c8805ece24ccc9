"""Recognize diffusers attention modules whose two products can be quantized, by their interface: diffusers is not imported."""

from __future__ import annotations

from torch import nn

__all__ = ["attention_layout", "is_attention"]

LAYOUTS = {
    "AttnProcessor": "single",
    "AttnProcessor2_0": "single",
    "JointAttnProcessor2_0": "joint",
    "FluxAttnProcessor": "flux",
}
"""Computation that each diffusers processor class performs: one stream (self- or cross-attention), the two streams of SD3,
or the two streams of Flux with rotary embeddings."""


def attention_layout(module: nn.Module) -> str | None:
    """Return the computation an attention module performs ("single", "joint" or "flux"), read from its processor.

    A processor that replaced diffusers' own states it as its attribute `layout`. None marks an unknown processor, whose
    products stay float.
    """
    processor = getattr(module, "processor", None)
    stated = getattr(processor, "layout", None)
    return stated if stated in LAYOUTS.values() else LAYOUTS.get(type(processor).__name__)


def is_attention(module: nn.Module) -> bool:
    """Say whether `module` is a diffusers attention module with a known layout."""
    named = all(hasattr(module, name) for name in ("to_q", "to_k", "to_v", "heads", "set_processor"))
    return named and attention_layout(module) is not None

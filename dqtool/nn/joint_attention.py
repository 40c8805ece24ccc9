"""Attention over a text and an image stream, as SD3 and Flux compute it; the caller supplies the products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dqtool.nn.layers import multiply_shared

__all__ = ["flux_attention", "joint_attention"]

Attend = Callable[[Any, Tensor, Tensor, Tensor, "Tensor | None"], Tensor]
"""(module, q, k, v `[N, H, S, D]`, mask) to `[N, S, H * D]`."""


def joint_attention(attn: Any, image: Tensor, text: Tensor | None, attend: Attend) -> Tensor | tuple[Tensor, Tensor]:
    """Compute diffusers' `JointAttnProcessor2_0`: image tokens `[N, S, C]` first, then text tokens `[N, S', C]`.

    Returns both streams, or the image stream alone where there is no text.
    """
    query, key, value = _projections(attn, image, ("to_q", "to_k", "to_v"), "norm_q", "norm_k")
    if text is not None:
        added = _projections(attn, text, ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_q", "norm_added_k")
        query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), added, strict=True))
    mixed = attend(attn, query, key, value, None)
    hidden: Tensor = attn.to_out[1](attn.to_out[0](mixed[:, : image.shape[1]]))
    if text is None:
        return hidden
    context = mixed[:, image.shape[1] :]
    return hidden, context if attn.context_pre_only else attn.to_add_out(context)


def flux_attention(
    attn: Any, image: Tensor, text: Tensor | None, mask: Tensor | None, rotary: Any, attend: Attend
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute diffusers' `FluxAttnProcessor`: text tokens first, then image tokens, with rotary embeddings on both.

    Single-stream blocks pass both streams in `image`.
    """
    from diffusers.models.embeddings import apply_rotary_emb

    query, key, value = _projections(attn, image, ("to_q", "to_k", "to_v"), "norm_q", "norm_k")
    if attn.added_kv_proj_dim is not None:
        assert text is not None
        added = _projections(attn, text, ("add_q_proj", "add_k_proj", "add_v_proj"), "norm_added_q", "norm_added_k")
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(added, (query, key, value), strict=True))
    if rotary is not None:
        turned = [apply_rotary_emb(x, rotary) for x in (query, key)]
        query, key = (x[0] if isinstance(x, tuple) else x for x in turned)
    mixed = attend(attn, query, key, value, mask)
    if text is None:
        return mixed
    context, picture = mixed.split([text.shape[1], mixed.shape[1] - text.shape[1]], dim=1)
    return attn.to_out[1](attn.to_out[0](picture)), attn.to_add_out(context)


def _projections(attn: Any, x: Tensor, names: tuple[str, str, str], norm_q: str, norm_k: str) -> list[Tensor]:
    """Return q, k, v `[N, H, S, D]` of one stream."""
    heads = [
        t.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for t in multiply_shared(x, *(getattr(attn, n) for n in names))
    ]
    for index, norm in enumerate((getattr(attn, norm_q, None), getattr(attn, norm_k, None))):
        if norm is not None:
            heads[index] = norm(heads[index])
    return heads

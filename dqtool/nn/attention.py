"""Attention with quantized operands: `q·kᵀ` and `softmax·v` multiply codes, each with a scale per step and head.

The tables live on diffusers' own attention modules (`X.q_scale` `[T, H]`, `X.q_zero_point`, ... `X.probs_scale`), so a
quantized network keeps its class and its tensor names. `QuantAttnProcessor` reads the tables. It supports every layout that
`attention_layout` returns; `joint_attention.py` holds the two-stream ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dqtool.core.affine import SYMMETRIC_BITS, lowest_code
from dqtool.core.bits import FLOAT_BITS, AttentionBits
from dqtool.graph.attention import PRODUCTS, attention_layout
from dqtool.nn.joint_attention import flux_attention, joint_attention
from dqtool.nn.layers import multiply_shared
from dqtool.nn.processors import keep_quantized, set_own
from dqtool.nn.quantizers import quantize_operand
from dqtool.nn.steps import StepIndex

__all__ = [
    "OPERANDS",
    "QuantAttnProcessor",
    "attach_operands",
    "operand_state",
    "operands_shapes",
]

NO_BITS = AttentionBits(FLOAT_BITS, FLOAT_BITS)

OPERANDS = ("q", "k", "v", "probs")
"""Names of the four operands of the two products, in the order in which they are computed."""


class QuantAttnProcessor:
    """Attention processor that replaces diffusers' own and quantizes the operands of both products.

    `bits` are the bits of the operands; the softmax output is unsigned with zero point 0. `layout` is the layout of the
    module (`attention_layout`). diffusers creates processors without arguments; such an instance stands for the
    processor that the module already has.
    """

    steps: StepIndex

    def __init__(self, bits: AttentionBits = NO_BITS, steps: StepIndex | None = None, layout: str = "single") -> None:
        self.bits, self.layout = bits, layout
        self.steps = steps  # type: ignore[assignment]

    def quantize(self, attn: nn.Module, name: str, x: Tensor) -> Tensor:
        """Fake-quantize operand `name`, `[N, H, S, D]`, with the module's tables; float operands pass through."""
        scale: Tensor | None = getattr(attn, f"{name}_scale", None)
        if scale is None:
            return x
        bits = self.bits.of(name)
        zero_point: Tensor | None = getattr(attn, f"{name}_zero_point", None)
        if zero_point is None:
            zero_point = torch.full_like(scale, 0 if name == "probs" else 2 ** (bits - 1), requires_grad=False)
        low = lowest_code(bits, symmetric=name != "probs")
        return quantize_operand(x, scale, zero_point, self.steps.rows_for(x), bits, low)

    def scores(self, attn: nn.Module, query: Tensor, key: Tensor) -> Tensor:
        """Return `q·kᵀ` `[N, H, S, S']` of `[N, H, S, D]` operands. Engines override `scores` and `weigh`."""
        return self.quantize(attn, "q", query) @ self.quantize(attn, "k", key).transpose(-1, -2)

    def weigh(self, attn: nn.Module, probs: Tensor, value: Tensor) -> Tensor:
        """Return `softmax·v`, `[N, H, S, D]`."""
        return self.quantize(attn, "probs", probs) @ self.quantize(attn, "v", value)

    def attend(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Compute both products and the softmax between them: `[N, H, S, D]` operands to `[N, S, H * D]` of the same dtype.

        `scale` multiplies the scores; None takes the module's, or `D ** -0.5`.
        """
        scale = self.scale_of(attn) if scale is None else scale
        scores = self.scores(attn, query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if mask is not None:
            scores = scores + mask
        probs = scores.softmax(-1)
        del scores  # takes the memory of `probs` once more
        return self.weigh(attn, probs, value).transpose(1, 2).flatten(2).to(query.dtype)

    def scale_of(self, attn: Any) -> float | None:
        """Return the factor of the scores that a module states; None for `D ** -0.5`."""
        return None if self.layout == PRODUCTS else getattr(attn, "scale", None)

    def __call__(
        self,
        attn: Any,  # diffusers' Attention or FluxAttention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Any = None,  # FluxAttention passes its rotary embedding in this place
        *_: object,
        **__: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run attention on `hidden_states` `[N, C, H, W]` or `[N, S, C]`; return the same shape, or both streams of two."""
        if self.layout == "joint":
            return joint_attention(attn, hidden_states, encoder_hidden_states, self.attend)
        if self.layout == "flux":
            return flux_attention(attn, hidden_states, encoder_hidden_states, attention_mask, temb, self.attend)
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        image_shape = hidden_states.shape if hidden_states.dim() == 4 else None
        if image_shape is not None:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)  # [N, S, C]
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])
            attention_mask = attention_mask.view(context.shape[0], attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            query, key, value = multiply_shared(hidden_states, attn.to_q, attn.to_k, attn.to_v)
        else:
            if attn.norm_cross:
                context = attn.norm_encoder_hidden_states(context)
            query = attn.to_q(hidden_states)
            key, value = multiply_shared(context, attn.to_k, attn.to_v)

        query, key, value = (
            t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value)
        )  # [N,H,S,D]
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        hidden_states = self.attend(attn, query, key, value, attention_mask)

        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if image_shape is not None:
            hidden_states = hidden_states.transpose(-1, -2).reshape(image_shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        scaled: Tensor = hidden_states / attn.rescale_output_factor
        return scaled.to(residual.dtype)


def has_zero_point(name: str, bits: int) -> bool:
    """Return whether an operand stores a zero point: softmax output (starts at 0) and symmetric 8-bit q, k, v store none."""
    return name != "probs" and bits != SYMMETRIC_BITS


def operands_shapes(bits: AttentionBits, timesteps: int, heads: int) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of the tables of one attention module in the packed form, by name."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    for name in OPERANDS:
        b = bits.of(name)
        if b < FLOAT_BITS:
            shapes[f"{name}_scale"] = ((timesteps, heads), "float32")
            if has_zero_point(name, b):
                shapes[f"{name}_zero_point"] = ((timesteps, heads), "uint8")
    return shapes


def attach_operands(attn: nn.Module, bits: AttentionBits, steps: StepIndex) -> None:
    """Install the quantizing processor in an attention module; the caller sets its tables afterwards.

    `processors.py` handles later calls that set another processor. A pipeline's `enable_attention_slicing` and
    `disable_attention_slicing` leave the processor in place.
    """
    layout = attention_layout(attn) or PRODUCTS
    set_own(attn, QuantAttnProcessor(bits, steps, layout))
    if layout == PRODUCTS:
        return
    attn.register_forward_pre_hook(keep_quantized)
    attn.__dict__["set_attention_slice"] = _keep_processor


def _keep_processor(_slice_size: object) -> None:
    """Replace diffusers' `set_attention_slice`, which would install a processor with float products."""


def operand_state(attn: nn.Module) -> dict[str, Tensor]:
    """Return the tables of one attention module as the artifact stores them."""
    state: dict[str, Tensor] = {}
    for name in OPERANDS:
        scale, zero_point = getattr(attn, f"{name}_scale", None), getattr(attn, f"{name}_zero_point", None)
        if scale is not None:
            state[f"{name}_scale"] = scale.detach()
        if zero_point is not None:
            state[f"{name}_zero_point"] = zero_point.detach().round().to(torch.uint8)
    return state

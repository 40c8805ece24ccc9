"""Attention of a network on integer products: shared inputs quantized once, both products on codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from dqtool.graph.attention import own_processor
from dqtool.nn.adaptable import Adaptable
from dqtool.nn.attention import OPERANDS, QuantAttnProcessor
from dqtool.nn.integer import IntegerAttention, IntegerLayer, integer_layer
from dqtool.nn.packed_layer import PackedLayer
from dqtool.runtimes.cpu import library, ops
from dqtool.runtimes.cpu.codes import Codes, CurrentStep
from dqtool.runtimes.cpu.library import pointer
from dqtool.runtimes.cpu.merging import merge
from dqtool.runtimes.cpu.product import Product, hooked, plain
from dqtool.runtimes.cpu.threads import float_threads

__all__ = ["IntegerAttnProcessor", "SharedInput", "is_bare", "merge_projections"]


class SharedInput(Adaptable, nn.Module):
    """Substitute of a projection that was merged with others of the same input. It returns its part of the merged output."""

    def __init__(self, merged: Product, start: int, out_features: int) -> None:
        super().__init__()
        self._merged = [merged]  # in a list: it is a child of the attention module, not of this one
        self.start, self.in_features, self.out_features = start, merged.in_channels, out_features

    @property
    def qweight(self) -> Tensor:
        """See `Adaptable.qweight`."""
        return self._merged[0].weight_scale

    def geometry_of_float(self) -> dict[str, object]:
        """See `Adaptable.geometry_of_float`."""
        return {"in_features": self.in_features, "out_features": self.out_features}

    def forward(self, input: Tensor, *_: object) -> Tensor:
        """Map `[..., C]` to `[..., out_features]`."""
        return self._merged[0](input)[..., self.start : self.start + self.out_features]


def merge_projections(
    name: str,
    attn: Any,
    choose: Callable[[IntegerLayer], Product | None],
    kinds: dict[str, str],
    merged: set[str],
) -> None:
    """Merge the projections of the attention module `name` that share their input, where `choose` has a product for them.

    `kinds` gains the arithmetic of these layers, `merged` their names.
    """
    if own_processor(attn).layout != "single":
        return
    for target, sources in (("to_qkv", ("to_q", "to_k", "to_v")), ("to_kv", ("to_k", "to_v"))):
        layers = [getattr(attn, source) for source in sources]
        if not all(isinstance(layer, PackedLayer) for layer in layers):
            continue
        integers = [integer_layer(layer, keep_packed=True) for layer in layers]
        whole = merge(integers) if all(layer.is_integer for layer in integers) else None
        product = None if whole is None else choose(whole)
        if product is None or (target == "to_qkv" and layers[0].in_features != layers[1].in_features):
            continue
        if target == "to_qkv" and getattr(attn, "is_cross_attention", False):
            continue
        setattr(attn, target, product)
        start = 0
        for source, layer in zip(sources, layers, strict=True):
            setattr(attn, source, SharedInput(product, start, layer.out_features))
            start += layer.out_features
            merged.add(f"{name}.{source}")
            kinds[f"{name}.{source}"] = "int8"
        break


def is_bare(attn: Any) -> bool:
    """Return whether no projection into a module's attention has something around it, such as a LoRA branch or a hook."""
    merged = (getattr(attn, name, None) for name in ("to_qkv", "to_kv"))
    return all(isinstance(each, SharedInput) or plain(each) for each in (attn.to_q, attn.to_k, attn.to_v)) and not any(
        hooked(each) for each in merged
    )


class IntegerAttnProcessor(QuantAttnProcessor):
    """`QuantAttnProcessor` on integers. `products` None leaves the two attention products in float.

    `scale` multiplies the scores; it is the module's, if known before the first call. A merged projection is the attention
    module's `to_qkv` (self-attention) or `to_kv` (cross-attention).
    """

    def __init__(
        self,
        like: QuantAttnProcessor | None = None,
        products: IntegerAttention | None = None,
        current_step: CurrentStep | None = None,
        scale: float | None = None,
    ) -> None:
        if like is None or current_step is None:
            super().__init__()
            return
        super().__init__(like.bits, like.steps, like.layout)
        self.products, self.current_step = products, current_step
        self.compiled = library.get() is not None
        self._steps: tuple[float, Tensor, Tensor, Tensor] | None = None
        if products is not None and scale is not None:
            self._steps = (scale, *self._all_steps(scale))

    def attend(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """See `QuantAttnProcessor.attend`."""
        n, h, sq, d = query.shape
        sk = key.shape[2]
        scale = self.scale_of(attn) if scale is None else scale
        in_float = self.products is None or value.shape[3] != d  # the kernels have one width
        if is_compiling():
            if in_float or not self.compiled:
                return super().attend(attn, query, key, value, mask, scale)
            operands = (query.float(), key.float(), value.float(), None if mask is None else mask.float())
            return ops.attention(*operands, *self._every_step(d, scale), self.current_step.rows).to(query.dtype)
        kernels = library.get()
        if in_float or kernels is None:
            with float_threads(2 * n * h * sq * sk * d):
                return super().attend(attn, query, key, value, mask, scale)
        tables, scores, result = self._tables(d, scale)
        q, k, v = (t.float() if t.stride(-1) == 1 else t.float().contiguous() for t in (query, key, value))
        strides = [library.strides(t) for t in (q, k, v)]
        steps: tuple[int, ...] = (0, 0, 0)
        if mask is not None:
            mask = mask.float().expand(n, h, sq, sk)
            mask = mask if mask.stride(-1) == 1 or sk == 1 else mask.contiguous()
            steps = mask.stride()[:3]
        out = torch.empty(n, sq, h * d)
        kernels.dq_attention(
            q.data_ptr(), strides[0], k.data_ptr(), strides[1], v.data_ptr(), strides[2], n, h, sq, sk, d,
            pointer(tables), pointer(scores), pointer(result), pointer(mask), *steps, out.data_ptr(),
        )  # fmt: skip
        return out.to(query.dtype)

    def __call__(
        self,
        attn: Any,  # diffusers' Attention or FluxAttention
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Any = None,
        *args: object,
        **kwargs: object,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Compute the attention module's output; arguments are those of `QuantAttnProcessor.__call__`."""
        # A context for merged q, k, v, or none for a cross-attention, takes the general way.
        first = getattr(attn, "to_qkv", None) if encoder_hidden_states is None else attn.to_q
        usual = isinstance(first, Product) and (encoder_hidden_states is None or hasattr(attn, "to_kv"))
        usual = usual and self.layout == "single" and attn.spatial_norm is None and is_bare(attn)
        if not isinstance(first, Product) or not usual:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        x = first.glue(hidden_states)
        image = x.dim() == 4
        if attn.group_norm is not None:
            codes = first.group_norm(x if image else x.transpose(1, 2).unsqueeze(-1), attn.group_norm)
        else:
            codes = first.quantize(x.flatten(2).transpose(1, 2) if image else x)
        residual = None
        if attn.residual_connection:
            residual = x.flatten(2).transpose(1, 2) if image else x
        out = self.from_codes(
            attn, codes, encoder_hidden_states, attention_mask, residual, 1.0 / attn.rescale_output_factor
        )
        if image:
            out = out.unflatten(1, hidden_states.shape[2:]).permute(
                0, 3, 1, 2
            )  # [N, C, H, W] over channels-last memory
        return out.to(hidden_states.dtype)

    def from_codes(
        self,
        attn: Any,
        codes: Codes,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        post: float = 1.0,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return `(attention * gate + residual) * post` `[N, S, C]` from the codes of its input; `gate` is `[N, C]`.

        The codes are those of the layer `to_qkv`, or with a `context` those of `to_q`.
        """
        if context is None:
            sizes = [layer.out_features for layer in (attn.to_q, attn.to_k, attn.to_v)]
            query, key, value = attn.to_qkv.multiply(codes).split(sizes, dim=-1)
        else:
            query = attn.to_q.multiply(codes)
            context = attn.norm_encoder_hidden_states(context) if attn.norm_cross else context
            key, value = attn.to_kv(attn.to_kv.glue(context)).split(
                [attn.to_k.out_features, attn.to_v.out_features], dim=-1
            )
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, key.shape[1], len(key))
            mask = mask.view(len(key), attn.heads, -1, mask.shape[-1])
        query, key, value = (t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        mixed = self.attend(attn, query, key, value, mask)
        out = attn.to_out[0]
        if plain(out):
            return out.multiply(out.quantize(mixed), residual=residual, post=post, gate=gate)
        mixed = out(mixed) if gate is None else out(mixed) * gate.unsqueeze(1)
        return (mixed if residual is None else mixed + residual) * post

    def _tables(self, d: int, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return (m, low, high) `[4, 3, H]` of the operands, and the scales of the scores and of the result, `[H]` each."""
        tables, scores, results = self._every_step(d, scale)
        row = self.current_step.row if len(tables) > 1 else 0
        return tables[row], scores[row], results[row]

    def _every_step(self, d: int, scale: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables of `_all_steps`, made once for each scale."""
        scale = d**-0.5 if scale is None else scale
        if self._steps is None or self._steps[0] != scale:
            made = (scale, *self._all_steps(scale))
            if is_compiling():  # an attribute must not hold what belongs to a graph
                return made[1:]
            self._steps = made
        return self._steps[1:]

    def _all_steps(self, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tables of `_tables` for all steps: `[T, 4, 3, H]`, `[T, H]` and `[T, H]`. T is 1 if no operand has steps."""
        assert self.products is not None
        operands = [self.products.operands[name] for name in OPERANDS]
        steps = max(operand.steps for operand in operands)
        each = [
            torch.stack([operand.multipliers(), operand.low.float(), operand.high.float()], 1).expand(steps, -1, -1)
            for operand in operands
        ]
        q, k, v, probs = (operand.scale for operand in operands)
        scores, results = (q * k * scale).expand(steps, -1), (probs * v).expand(steps, -1)
        return torch.stack(each, 1).contiguous(), scores.contiguous(), results.contiguous()

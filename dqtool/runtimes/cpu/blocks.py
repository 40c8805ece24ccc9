"""diffusers' blocks with norm, activation and quantizer in one pass, and residuals added by the product itself.

A block is fused by giving it a subclass of its class, so that it keeps its place, its name and its children; where a
block has something the fused forward doesn't know, it is left as it is and its layers quantize one by one. So do those of a
fused block while one of them has something around it, such as a LoRA branch.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from dqtool.nn.adaptable import Adaptable
from dqtool.nn.processors import runs_own, without_hook
from dqtool.runtimes.cpu.attention import IntegerAttnProcessor, is_bare
from dqtool.runtimes.cpu.codes import GEGLU, GELU, GELU_TANH, NONE, SILU, Codes
from dqtool.runtimes.cpu.product import Product, plain

__all__ = ["fuse"]


def fuse(network: nn.Module) -> int:
    """Fuse what can be fused, in place; returns the number of blocks."""
    count = 0
    for module in list(network.modules()):
        fused = _FUSED.get(type(module))
        if fused is not None and fused.fits(module):
            module.__class__ = fused
            count += 1
            if isinstance(module, FusedAttention):
                without_hook(module)
    return count + _fuse_head(network)


class FusedResnetBlock2D(ResnetBlock2D):
    """`ResnetBlock2D` in four passes: norm-act-quantize, convolve (+ time embedding), the same again (+ input)."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Return whether the block has the plain structure that this class computes."""
        return (
            isinstance(block.conv1, Product)
            and isinstance(block.conv2, Product)
            and isinstance(block.norm1, nn.GroupNorm)
            and isinstance(block.norm2, nn.GroupNorm)
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.upsample is None
            and block.downsample is None
            and block.time_embedding_norm in ("default", "scale_shift")
        )

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *_: object, **__: object) -> Tensor:
        """Compute the output of the original class."""
        conv1: Any = self.conv1
        conv2: Any = self.conv2
        if not (plain(conv1) and plain(conv2)):
            return super().forward(input_tensor, temb)  # type: ignore[arg-type]
        x = conv1.glue(input_tensor)
        codes = conv1.group_norm(x, self.norm1, SILU)
        bias = scale = shift = None
        if self.time_emb_proj is not None and temb is not None:
            proj: Any = self.time_emb_proj
            if plain(proj):
                emb = proj.multiply(proj.quantize(proj.glue(temb), NONE if self.skip_time_act else SILU))
            else:
                wide = temb.float() if self.skip_time_act else F.silu(temb.float())
                emb = proj(wide.to(next((p.dtype for p in proj.parameters() if p.is_floating_point()), wide.dtype)))
            if self.time_embedding_norm == "scale_shift":
                scale, shift = emb.chunk(2, dim=1)
            else:
                bias = (emb if conv1.bias is None else emb + conv1.bias).expand(len(x), -1)
        h = conv1.multiply(codes, bias=bias)
        if scale is not None and shift is not None:
            scale, shift = (t.expand(len(x), -1).contiguous() for t in (scale, shift))
        codes = conv2.group_norm(h, self.norm2, SILU, scale, shift)
        shortcut: Any = self.conv_shortcut
        residual = x if shortcut is None else shortcut(x)
        out = conv2.multiply(codes, residual=residual, post=1.0 / self.output_scale_factor)
        return out.to(input_tensor.dtype)


class FusedDownsample2D(Downsample2D):
    """`Downsample2D` by convolution; its lopsided padding goes into the codes."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Return whether the block convolves an input without normalization."""
        return block.use_conv and block.norm is None and isinstance(block.conv, Product)

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Compute the output of the original class."""
        conv: Any = self.conv
        if not plain(conv):
            return super().forward(hidden_states)
        extra = (1, 1) if self.padding == 0 else (0, 0)
        return conv.multiply(conv.quantize(conv.glue(hidden_states), extra=extra)).to(hidden_states.dtype)


class FusedUpsample2D(Upsample2D):
    """`Upsample2D` whose pixels are repeated as codes."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Return whether the block interpolates and then convolves."""
        return (
            block.use_conv
            and not block.use_conv_transpose
            and block.norm is None
            and block.interpolate
            and block.name == "conv"
            and isinstance(block.conv, Product)
        )

    def forward(self, hidden_states: Tensor, output_size: Any = None, *_: object, **__: object) -> Tensor:
        """Compute the output of the original class."""
        conv: Any = self.conv
        if not plain(conv):
            return super().forward(hidden_states, output_size)
        x = conv.glue(hidden_states)
        if output_size is not None:
            return conv(F.interpolate(x, size=output_size, mode="nearest")).to(hidden_states.dtype)
        return conv.multiply(conv.quantize(x, up=2)).to(hidden_states.dtype)


class FusedFeedForward(FeedForward):
    """`FeedForward` whose activation and second quantizer are one pass."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Return whether the block is GEGLU or GELU between two integer layers."""
        name = type(block.net[0]).__name__
        return (
            name in ("GEGLU", "GELU")
            and isinstance(block.net[0].proj, Product)
            and isinstance(block.net[2], Product)
            and (name == "GEGLU" or block.net[0].approximate in ("none", "tanh"))
        )

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """Compute the output of the original class."""
        first: Any = self.net[0].proj
        if not self.is_bare():
            return super().forward(hidden_states)
        return self.from_codes(first.quantize(first.glue(hidden_states))).to(hidden_states.dtype)

    def is_bare(self) -> bool:
        """Return whether neither layer has something around it."""
        act: Any = self.net[0]
        return plain(act.proj) and plain(self.net[2])

    def from_codes(self, codes: Codes, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """Return the result from the codes of the first layer's input, times `gate` `[N, C]`, plus `residual`."""
        act: Any = self.net[0]
        out: Any = self.net[2]
        kind = GEGLU if type(act).__name__ == "GEGLU" else GELU_TANH if act.approximate == "tanh" else GELU
        return out.multiply(act.proj.feed(codes, out, kind), residual=residual, gate=gate)


class FusedBasicTransformerBlock(BasicTransformerBlock):
    """`BasicTransformerBlock` with layer norm or adaLN-Zero in front of its quantizers."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Return whether the block consists of the plain parts that this class computes."""

        def attention(attn: Any, merged: str) -> bool:
            return (
                isinstance(attn.processor, IntegerAttnProcessor)
                and hasattr(attn, merged)
                and attn.group_norm is None
                and attn.spatial_norm is None
                and not attn.residual_connection
                and attn.rescale_output_factor == 1.0
            )

        norms = [block.norm3 if block.norm_type == "layer_norm" else None, getattr(block, "norm2", None)]
        return (
            block.norm_type in ("layer_norm", "ada_norm_zero")
            and not block.only_cross_attention
            and block.pos_embed is None
            and not hasattr(block, "fuser")
            and attention(block.attn1, "to_qkv")
            and (block.attn2 is None or (attention(block.attn2, "to_kv") and isinstance(block.attn2.to_q, Product)))
            and all(norm is None or type(norm) is nn.LayerNorm for norm in norms)
            and type(block.ff) in (FeedForward, FusedFeedForward)
            and FusedFeedForward.fits(block.ff)
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Compute the output of the original class."""
        feed_forward: Any = self.ff
        fused = runs_own(self.attn1) and is_bare(self.attn1) and feed_forward.is_bare()
        fused = fused and (self.attn2 is None or (runs_own(self.attn2) and is_bare(self.attn2)))
        if not fused or (self.attn2 is not None and encoder_hidden_states is None):
            rest: Any = (encoder_attention_mask, timestep, cross_attention_kwargs, class_labels, added_cond_kwargs)
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, *rest)
        attn1: Any = self.attn1
        x = attn1.to_qkv.glue(hidden_states)
        attn2: Any = self.attn2
        ff: Any = self.ff
        norm3: Any = self.norm3
        zero = self.norm_type == "ada_norm_zero"
        gate1 = gate2 = scale2 = shift2 = None
        if zero:
            norm1: Any = self.norm1
            emb = norm1.linear(norm1.silu(norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)))
            shift1, scale1, gate1, shift2, scale2, gate2 = emb.chunk(6, dim=1)
            codes = attn1.to_qkv.layer_norm(x, norm1.norm, scale1, shift1)
        else:
            codes = attn1.to_qkv.layer_norm(x, self.norm1)
        x = attn1.processor.from_codes(attn1, codes, None, attention_mask, x, gate=gate1)
        if attn2 is not None:
            codes = attn2.to_q.layer_norm(x, self.norm2)
            x = attn2.processor.from_codes(attn2, codes, encoder_hidden_states, encoder_attention_mask, x)
        codes = ff.net[0].proj.layer_norm(x, norm3, scale2, shift2)
        return ff.from_codes(codes, x, gate2).to(hidden_states.dtype)


class FusedTransformer2DModel(Transformer2DModel):
    """`Transformer2DModel` on images, whose norm goes into the codes of its first layer and whose input is added by its
    last: nothing in between leaves the channels-last layout."""

    @staticmethod
    def fits(block: Any) -> bool:
        """Return whether the model has a plain norm and two integer layers around its blocks."""
        return (
            block.is_input_continuous
            and type(block.norm) is nn.GroupNorm
            and isinstance(block.proj_in, Product)
            and isinstance(block.proj_out, Product)
        )

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        proj_in: Any = self.proj_in
        if not (plain(proj_in) and plain(self.proj_out)):
            return super()._operate_on_continuous_inputs(hidden_states)
        h = proj_in.multiply(proj_in.group_norm(proj_in.glue(hidden_states), self.norm))
        if proj_in.is_conv:
            h = h.permute(0, 2, 3, 1).flatten(1, 2)
        return h.to(hidden_states.dtype), h.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        proj_out: Any = self.proj_out
        if not (plain(proj_out) and plain(self.proj_in)):
            sizes = (batch_size, height, width, inner_dim)
            return super()._get_output_for_continuous_inputs(hidden_states, residual, *sizes)
        h, whole = proj_out.glue(hidden_states), proj_out.glue(residual)
        if proj_out.is_conv:
            image = h.view(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
            return proj_out.multiply(proj_out.quantize(image), residual=whole).to(residual.dtype)
        h = proj_out.multiply(proj_out.quantize(h), residual=whole.permute(0, 2, 3, 1).flatten(1, 2))
        return h.unflatten(1, (height, width)).permute(0, 3, 1, 2).to(residual.dtype)


class FusedAttention(Attention):
    """`Attention` that hands its arguments on without looking at its processor's signature in each call."""

    @staticmethod
    def fits(attn: Any) -> bool:
        """Return whether the attention module has the processor of this runtime."""
        return isinstance(attn.processor, IntegerAttnProcessor)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Compute the output of the original class."""
        own = runs_own(self)
        processor: Any = self.processor
        if not own or not cross_attention_kwargs.keys() <= {"temb"}:
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)
        return processor(self, hidden_states, encoder_hidden_states, attention_mask, **cross_attention_kwargs)


class HeadNorm(nn.GroupNorm):
    """The norm and the activation before `conv_out` of `network`; it leaves both to `conv_out` where that is fused."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` if `conv_out` is fused with this norm and activation, else compute the original class's output."""
        out = self.__dict__["network"].conv_out
        if isinstance(out, NormActProduct) and plain(out.product):
            return input
        return F.silu(super().forward(input.to(self.weight.dtype))).to(input.dtype)


class NormActProduct(Adaptable, nn.Module):
    """The head of a UNet, `conv_out(act(norm(x)))`, in the place of its convolution.

    A LoRA branch around it needs the normalized input: it then is the convolution alone, and `HeadNorm` does the rest.
    """

    def __init__(self, network: nn.Module, norm: nn.GroupNorm, product: Product) -> None:
        super().__init__()
        self.__dict__.update(network=network, norm=norm)  # both stay modules of the network alone
        self.product, self.groups = product, product.groups  # peft reads the groups when it swaps adapters

    @property
    def qweight(self) -> Tensor:
        """See `Adaptable.qweight`."""
        return self.product.qweight

    def geometry_of_float(self) -> dict[str, object]:
        """See `Adaptable.geometry_of_float`."""
        return self.product.geometry_of_float()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[N, C, H, W]` to `[N, C_out, H, W]`, with the norm and the activation before the layer."""
        if self.__dict__["network"].conv_out is not self or not plain(self.product):
            found: Tensor = self.product(x)
            return found
        return self.product.multiply(self.product.group_norm(self.product.glue(x), self.__dict__["norm"], SILU)).to(
            x.dtype
        )


def _fuse_head(network: Any) -> int:
    norm, act, out = (getattr(network, name, None) for name in ("conv_norm_out", "conv_act", "conv_out"))
    if type(norm) is nn.GroupNorm and isinstance(act, nn.SiLU) and isinstance(out, Product) and out.is_conv:
        norm.__class__, network.conv_act = HeadNorm, nn.Identity()
        norm.__dict__["network"] = network
        network.conv_out = NormActProduct(network, norm, out)
        return 1
    return 0


_FUSED: dict[type, Any] = {
    ResnetBlock2D: FusedResnetBlock2D,
    Downsample2D: FusedDownsample2D,
    Upsample2D: FusedUpsample2D,
    FeedForward: FusedFeedForward,
    BasicTransformerBlock: FusedBasicTransformerBlock,
    Transformer2DModel: FusedTransformer2DModel,
    Attention: FusedAttention,
}

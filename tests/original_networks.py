"""The original networks, written out compactly with the names their authors gave them, to compare conversions with.

Random weights everywhere, also where the authors start at zero, so that every tensor matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DdimModel", "DiT", "FirstStage", "UNetModel", "randomize"]


def randomize(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter random, norms near one; returns the network in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.data = noise * 0.1 + (1 if "norm" in name or name.endswith("layers.0.weight") else 0)
        else:
            parameter.data = noise / math.sqrt(parameter[0].numel())
    return network.eval().requires_grad_(False)


def sinusoids(t: Tensor, width: int, *, cosine_first: bool, denominator: int) -> Tensor:
    """Timestep features `[N, width]`."""
    half = width // 2
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half).float() / denominator)
    parts = (angles.cos(), angles.sin()) if cosine_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=1)


# ---------------------------------------------------------------------------------------- ermongroup/ddim


class DdimResnet(nn.Module):
    def __init__(self, width_in: int, width: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width_in, eps=1e-6), nn.Conv2d(width_in, width, 3, padding=1)
        self.temb_proj = nn.Linear(emb, width)
        self.norm2, self.conv2 = nn.GroupNorm(32, width, eps=1e-6), nn.Conv2d(width, width, 3, padding=1)
        if width_in != width:
            self.nin_shortcut = nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DdimAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class DdimResample(nn.Module):
    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class DdimModel(nn.Module):
    """`Model` of ermongroup/ddim; attends on 16x16."""

    def __init__(self, ch: int = 32, ch_mult: Sequence[int] = (1, 2), blocks: int = 1, size: int = 32) -> None:
        super().__init__()
        self.ch = ch
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, 4 * ch), nn.Linear(4 * ch, 4 * ch)])
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        widths, inputs = [ch * m for m in ch_mult], [ch, *[ch * m for m in ch_mult]]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            down = nn.Module()
            attends = size >> level == 16
            down.block = nn.ModuleList(
                DdimResnet(inputs[level] if i == 0 else width, width, 4 * ch) for i in range(blocks)
            )
            down.attn = nn.ModuleList(DdimAttention(width) for _ in range(blocks if attends else 0))
            if level < len(widths) - 1:
                down.downsample = DdimResample(width, up=False)
            self.down.append(down)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = (DdimResnet(widths[-1], widths[-1], 4 * ch) for _ in range(2))
        self.mid.attn_1 = DdimAttention(widths[-1])
        for level, width in enumerate(widths):
            up, before = nn.Module(), widths[min(level + 1, len(widths) - 1)]
            up.block = nn.ModuleList()
            for i in range(blocks + 1):
                skip = inputs[level] if i == blocks else width
                up.block.append(DdimResnet((before if i == 0 else width) + skip, width, 4 * ch))
            up.attn = nn.ModuleList(DdimAttention(width) for _ in range(blocks + 1 if size >> level == 16 else 0))
            if level:
                up.upsample = DdimResample(width, up=True)
            self.up.append(up)
        self.norm_out, self.conv_out = nn.GroupNorm(32, ch, eps=1e-6), nn.Conv2d(ch, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        temb = sinusoids(t, self.ch, cosine_first=False, denominator=self.ch // 2 - 1)
        temb = self.temb.dense[1](F.silu(self.temb.dense[0](temb)))
        hs = [self.conv_in(x)]
        for down in self.down:
            for i, block in enumerate(down.block):
                h = block(hs[-1], temb)
                hs.append(down.attn[i](h) if len(down.attn) else h)
            if hasattr(down, "downsample"):
                hs.append(down.downsample(hs[-1]))
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(hs[-1], temb)), temb)
        for up in reversed(self.up):
            for i, block in enumerate(up.block):
                h = block(torch.cat([h, hs.pop()], 1), temb)
                h = up.attn[i](h) if len(up.attn) else h
            h = up.upsample(h) if hasattr(up, "upsample") else h
        return self.conv_out(F.silu(self.norm_out(h)))


class Plain(DdimResnet):
    """The block of first stages, which know no time."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width, 1)
        del self.temb_proj

    def forward(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


def _middle(width: int) -> nn.Module:
    mid = nn.Module()
    mid.block_1, mid.attn_1, mid.block_2 = Plain(width, width), DdimAttention(width), Plain(width, width)
    return mid


class FirstStage(nn.Module):
    """`AutoencoderKL` of CompVis, or `VQModelInterface` with `codes`; `forward` decodes latents."""

    def __init__(
        self, widths: Sequence[int] = (32, 64), blocks: int = 1, latent: int = 4, codes: int | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.encoder.down, self.decoder.up = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            down, up = nn.Module(), nn.Module()
            before = widths[max(level - 1, 0)]
            down.block = nn.ModuleList(Plain(before if i == 0 else width, width) for i in range(blocks))
            if level < len(widths) - 1:
                down.downsample = DdimResample(width, up=False)
            above = widths[min(level + 1, len(widths) - 1)]
            up.block = nn.ModuleList(Plain(above if i == 0 else width, width) for i in range(blocks + 1))
            if level:
                up.upsample = DdimResample(width, up=True)
            self.encoder.down.append(down)
            self.decoder.up.append(up)
        moments = latent if codes else 2 * latent
        self.encoder.mid, self.decoder.mid = _middle(widths[-1]), _middle(widths[-1])
        self.encoder.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.encoder.conv_out = nn.Conv2d(widths[-1], moments, 3, padding=1)
        self.decoder.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.decoder.norm_out, self.decoder.conv_out = (
            nn.GroupNorm(32, widths[0], eps=1e-6),
            nn.Conv2d(widths[0], 3, 3, padding=1),
        )
        self.quant_conv, self.post_quant_conv = nn.Conv2d(moments, moments, 1), nn.Conv2d(latent, latent, 1)
        if codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(codes, latent)

    def forward(self, z: Tensor) -> Tensor:
        if hasattr(self, "quantize"):
            table = self.quantize.embedding.weight
            z = (
                table[torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2), table).argmin(1)]
                .view(len(z), *z.shape[2:], -1)
                .permute(0, 3, 1, 2)
            )
        h = self.decoder.conv_in(self.post_quant_conv(z))
        mid = self.decoder.mid
        h = mid.block_2(mid.attn_1(mid.block_1(h)))
        for up in reversed(self.decoder.up):
            for block in up.block:
                h = block(h)
            h = up.upsample(h) if hasattr(up, "upsample") else h
        return self.decoder.conv_out(F.silu(self.decoder.norm_out(h)))


# -------------------------------------------------- CompVis/latent-diffusion and CompVis/stable-diffusion


class ResBlock(nn.Module):
    def __init__(self, width_in: int, width: int, emb: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(nn.GroupNorm(32, width_in), nn.SiLU(), nn.Conv2d(width_in, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, width * (2 if scale_shift else 1)))
        conv = nn.Conv2d(width, width, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample else x

    def forward(self, x: Tensor, emb: Tensor, _: Tensor | None) -> Tensor:
        h = self.in_layers[2](self._resampled(self.in_layers[:2](x)))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self._resampled(x)) + h


class AttentionBlock(nn.Module):
    """`conv` is `nn.Conv1d` in guided-diffusion, `nn.Conv2d` in consistency models; `new_order`: all of q, then k, then v."""

    def __init__(self, width: int, heads: int, conv: Any = nn.Conv1d, new_order: bool = False) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv, self.proj_out = nn.GroupNorm(32, width), conv(width, 3 * width, 1), conv(width, width, 1)

    def forward(self, x: Tensor, _emb: Tensor, _context: Tensor | None) -> Tensor:
        shaped = x if isinstance(self.qkv, nn.Conv2d) else x.flatten(2)
        qkv = self.qkv(self.norm(shaped)).flatten(2)
        n, width, length = qkv.shape
        ch = width // (3 * self.heads)
        if self.new_order:
            q, k, v = (part.reshape(n * self.heads, ch, length) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(n * self.heads, ch * 3, length).split(ch, dim=1)
        weights = (torch.einsum("bct,bcs->bts", q, k) / math.sqrt(ch)).softmax(-1)
        a = torch.einsum("bts,bcs->bct", weights, v).reshape(n, -1, length)
        return x + self.proj_out(a.view_as(shaped)).view_as(x)


class CrossAttention(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 8 * width)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1, self.attn2 = CrossAttention(width, width, heads), CrossAttention(width, context, heads)
        self.ff = nn.Module()
        self.ff.net = nn.Sequential(GEGLU(width), nn.Dropout(0.0), nn.Linear(4 * width, width))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.norm1(x)
        x = self.attn1(h, h) + x
        x = self.attn2(self.norm2(x), context) + x
        return self.ff.net(self.norm3(x)) + x


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int, linear: bool, depth: int = 1) -> None:
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in, self.proj_out = (
            nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1) for _ in range(2)
        )
        self.transformer_blocks = nn.ModuleList(TransformerBlock(width, context, heads) for _ in range(depth))

    def forward(self, x: Tensor, _: Tensor, context: Tensor | None) -> Tensor:
        h = self.norm(x)
        h = h if self.linear else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)
        h = self.proj_in(h) if self.linear else h
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h) if self.linear else h
        h = h.transpose(1, 2).reshape(x.shape)
        return x + (h if self.linear else self.proj_out(h))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class UNetModel(nn.Module):
    """`UNetModel` of openaimodel.py; `context` makes its attention `SpatialTransformer`s.

    `depths` are the transformer blocks of each resolution, `mid_depth` those of the middle (0: SSD-1B has none); `vector` is the
    width of what is added to the timestep, `classes` the number of labels.
    """

    def __init__(
        self,
        model_channels: int,
        channel_mult: Sequence[int],
        attention: Sequence[int],
        in_channels: int = 4,
        blocks: int = 2,
        heads: int | None = None,
        head_channels: int | None = None,
        context: int | None = None,
        scale_shift: bool = False,
        resblock_updown: bool = False,
        linear: bool = False,
        depths: Sequence[int] | None = None,
        mid_depth: int = 1,
        vector: int | None = None,
        out_channels: int | None = None,
        classes: int | None = None,
        conv: Any = nn.Conv1d,
        new_order: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        emb = 4 * model_channels
        if vector is not None:
            projection = nn.Sequential(nn.Linear(vector, emb), nn.SiLU(), nn.Linear(emb, emb))
            self.label_emb = nn.Sequential(projection)

        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)

        def attend(width: int, depth: int = 1) -> nn.Module:
            count = heads or width // head_channels
            if context is None:
                return AttentionBlock(width, count, conv, new_order)
            return SpatialTransformer(width, context, count, linear, depth)

        def resnet(width_in: int, width: int, resample: str = "") -> ResBlock:
            return ResBlock(width_in, width, emb, scale_shift, resample)

        self.time_embed = nn.Sequential(nn.Linear(model_channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, model_channels, 3, padding=1)])])
        self.output_blocks = nn.ModuleList()
        widths, ch, ds = [model_channels], model_channels, 1
        for level, mult in enumerate(channel_mult):
            for _ in range(blocks):
                layers: list[nn.Module] = [resnet(ch, mult * model_channels)]
                ch = mult * model_channels
                depth = depths[level] if depths else 1
                self.input_blocks.append(nn.ModuleList(layers + ([attend(ch, depth)] if ds in attention else [])))
                widths.append(ch)
            if level < len(channel_mult) - 1:
                self.input_blocks.append(nn.ModuleList([resnet(ch, ch, "down") if resblock_updown else Downsample(ch)]))
                widths.append(ch)
                ds *= 2
        middle = [resnet(ch, ch), attend(ch, mid_depth), resnet(ch, ch)]
        self.middle_block = nn.ModuleList(middle if mid_depth else middle[:1])
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(blocks + 1):
                layers = [resnet(ch + widths.pop(), mult * model_channels)]
                ch = mult * model_channels
                if ds in attention:
                    layers.append(attend(ch, depths[level] if depths else 1))
                if level and i == blocks:
                    layers.append(resnet(ch, ch, "up") if resblock_updown else Upsample(ch))
                    ds //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out_channels or in_channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        emb = sinusoids(t, self.model_channels, cosine_first=True, denominator=self.model_channels // 2)
        emb = self.time_embed(emb)
        emb = emb if y is None else emb + self.label_emb(y)

        def run(layers: nn.ModuleList, h: Tensor) -> Tensor:
            for layer in layers:
                h = layer(h) if isinstance(layer, nn.Conv2d) else layer(h, emb, context)
            return h

        hs = []
        for layers in self.input_blocks:
            x = run(layers, x)
            hs.append(x)
        x = run(self.middle_block, x)
        for layers in self.output_blocks:
            x = run(layers, torch.cat([x, hs.pop()], dim=1))
        return self.out(x)


# ------------------------------------------------------------------------------------ facebookresearch/DiT


class DitAttention(nn.Module):
    """timm's `Attention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class DitBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = DitAttention(width, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        x = x + gate1 * self.attn(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale1) + shift1)
        h = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale2) + shift2
        return x + gate2 * self.mlp.fc2(F.gelu(self.mlp.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    """`DiT` of models.py, with its fixed table of positions."""

    def __init__(
        self, width: int, depth: int, heads: int, size: int = 8, patch: int = 2, channels: int = 4, classes: int = 10
    ) -> None:
        super().__init__()
        self.patch, self.grid, self.out_channels = patch, size // patch, 2 * channels
        self.x_embedder, self.t_embedder, self.y_embedder = nn.Module(), nn.Module(), nn.Module()
        self.x_embedder.proj = nn.Conv2d(channels, width, patch, stride=patch)
        self.t_embedder.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder.embedding_table = nn.Embedding(classes + 1, width)
        self.blocks = nn.ModuleList(DitBlock(width, heads) for _ in range(depth))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(width, patch**2 * self.out_channels)
        self.final_layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.register_buffer("pos_embed", self._positions(width))

    def _positions(self, width: int) -> Tensor:
        frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
        rows, columns = torch.meshgrid(torch.arange(self.grid), torch.arange(self.grid), indexing="ij")
        tables = []
        for places in (columns, rows):  # "here w goes first"
            angles = places.flatten()[:, None] * frequencies
            tables += [angles.sin(), angles.cos()]
        return torch.cat(tables, dim=1)[None]

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder.mlp(
            sinusoids(t, 256, cosine_first=True, denominator=128)
        ) + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        x = self.final_layer.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        x = x.unflatten(1, (self.grid, self.grid)).unflatten(-1, (self.patch, self.patch, self.out_channels))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

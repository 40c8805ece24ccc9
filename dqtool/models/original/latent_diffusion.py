"""CompVis/latent-diffusion: LDM-4 bedroom, LDM-8 church and their like (no condition), LDM-4 ImageNet (a class)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError
from dqtool.models.amendments import KEY
from dqtool.models.original.layout import Description, Known, Layout, Shapes, register
from dqtool.models.original.openai_unet import (
    Structure,
    network_names,
    network_shapes,
    network_tensors,
    scaled_linear,
    structure,
    unet_parameters,
)
from dqtool.models.original.spatial import convert_spatial, describe_spatial

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LatentDiffusion", "LatentDiffusionByClass"]

_PUBLISHED: dict[tuple[int, ...], dict[str, Any]] = {
    (224, 448, 672, 896): {"num_head_channels": 32, "linear_end": 0.0195},  # LDM-4: LSUN-Bedroom, CelebA-HQ, FFHQ
    (192, 384, 384, 768, 768): {"num_heads": 8, "linear_end": 0.0155},  # LDM-8: LSUN-Church
}
"""What shapes don't tell of the published unconditional models, by the channels of their resolutions."""

_CIN256 = (192, 384, 576, 960)
"""Channels of the published class-conditional LDM-4, which has one head."""

_LATENT_SIZE = {3: 64, 4: 32}
"""Side of the latents of 256x256 images by their channels: first stages of factor 4 and 8."""

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "label_emb": "class_embedding",
}


@register
class LatentDiffusion(Layout):
    """`UNetModel` with `AttentionBlock`s (`ldm/modules/diffusionmodules/openaimodel.py`)."""

    name = "latent-diffusion"
    title = "CompVis/latent-diffusion, unconditional"

    def matches(self, shapes: Shapes) -> bool:
        """By numbered blocks whose attention has one product for q, k and v."""
        network = network_shapes(shapes)
        return bool(network) and any(name.endswith(".1.qkv.weight") for name in network)

    def network(self, names: Iterable[str]) -> set[str]:
        """Without the first stage, the conditioner and the averaged copies."""
        return network_names(names)

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Heads and latent size come from `published`, else from the published model of these channels."""
        network = network_shapes(shapes)
        found = structure(network, where)
        like = _PUBLISHED.get(tuple(found.channels), {})
        schedule = scaled_linear(known.published, 0.0015, like.get("linear_end", 0.0195))
        if known.config is not None:
            return Description(dict(known.config), schedule)
        given = {**like, **unet_parameters(known.published)}
        attention, amended = _heads(found, given, where)
        if given.get("use_new_attention_order"):
            raise ArtifactError("dqtool does not read models with use_new_attention_order", where=where)
        attend, plain = ("AttnDownBlock2D", "AttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
        if found.resnet_sampling:
            plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        levels = len(found.channels)
        kinds = [attend if attends else plain for attends in found.attends]
        sampling = "resnet" if found.resnet_sampling else "conv"
        downs = [down for down, _ in kinds]
        if found.resnet_sampling and not found.attends[-1]:
            downs[-1] = "DownBlock2D"  # nothing is resampled there
        ups = [up for _, up in reversed(kinds)]
        if found.resnet_sampling and not found.attends[0]:
            ups[levels - 1] = "UpBlock2D"
        config: dict[str, Any] = {
            "_class_name": "UNet2DModel",
            "sample_size": int(given.get("image_size") or _LATENT_SIZE.get(found.in_channels, 32)),
            "in_channels": found.in_channels,
            "out_channels": found.out_channels,
            "down_block_types": downs,
            "up_block_types": ups,
            "block_out_channels": found.channels,
            "layers_per_block": found.layers_per_block,
            "downsample_type": sampling,
            "upsample_type": sampling,
            "resnet_time_scale_shift": "scale_shift" if found.scale_shift else "default",
            "attention_head_dim": attention,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,
            "norm_eps": 1e-5,
            "num_class_embeds": found.classes,
        }
        if amended:
            config[KEY] = amended
        return Description(config, schedule)

    def convert(self, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """Renames; splits the product for q, k and v, in which every head has its three parts together."""
        per_level = config["layers_per_block"] + 1
        tensors = network_tensors(state)
        converted: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            if owner in _ENDS:
                converted[f"{_ENDS[owner]}.{leaf}"] = tensor
                continue
            side, *rest = owner.split(".")
            if side == "middle_block":
                number, part = rest[0], ".".join(rest[1:])
                prefix = {"0": "mid_block.resnets.0", "1": "mid_block.attentions.0", "2": "mid_block.resnets.1"}[number]
            elif side in ("input_blocks", "output_blocks"):
                index, position, part = int(rest[0]), rest[1], ".".join(rest[2:])
                up = side == "output_blocks"
                level, layer = divmod(index if up else index - 1, per_level)
                block = f"{'up' if up else 'down'}_blocks.{level}"
                if part == "op":
                    prefix, part = f"{block}.downsamplers.0", "conv"
                elif part == "conv":
                    prefix = f"{block}.upsamplers.0"
                elif position == "0" and not up and layer == per_level - 1:
                    prefix = f"{block}.downsamplers.0"
                elif position != "0" and part in _RESNET:
                    prefix = f"{block}.upsamplers.0"
                else:
                    prefix = f"{block}.{'resnets' if position == '0' else 'attentions'}.{layer}"
            else:
                raise ArtifactError(f"The checkpoint holds '{name}', which this layout does not have", where=where)
            if ".attentions." in prefix:
                heads = _heads_of(config, tensors[f"{name[: name.rindex('.' + part)]}.proj_out.weight"].shape[0])
                converted.update(_attention(prefix, part, leaf, tensor, heads))
            else:
                converted[f"{prefix}.{_RESNET.get(part, part)}.{leaf}"] = tensor
        return converted


@register
class LatentDiffusionByClass(Layout):
    """`UNetModel` with `SpatialTransformer`s that read the embedding of a class."""

    name = "latent-diffusion-class"
    title = "CompVis/latent-diffusion, class-conditional"

    def matches(self, shapes: Shapes) -> bool:
        """By cross-attention on a context as wide as LDM-4 ImageNet's class embedding, or by that embedding."""
        network = network_shapes(shapes)
        contexts = [shape[1] for name, shape in network.items() if name.endswith("attn2.to_k.weight")]
        return bool(contexts) and (contexts[0] == 512 or "cond_stage_model.embedding.weight" in shapes)

    def network(self, names: Iterable[str]) -> set[str]:
        """Without the first stage, the conditioner and the averaged copies."""
        return network_names(names)

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """One head in cin256-v2; another model's heads come from the authors' YAML.

        Raises:
            ArtifactError: nothing names the heads.
        """
        found = structure(network_shapes(shapes), where)
        schedule = scaled_linear(known.published, 0.0015, 0.0195)
        if known.config is not None:
            return Description(dict(known.config), schedule)
        like = {"num_heads": 1} if tuple(found.channels) == _CIN256 else {}
        given = {**like, **unet_parameters(known.published)}
        if not {"num_heads", "num_head_channels"} & given.keys():
            raise _unknown_heads(found, where)
        size = int(given.get("image_size") or _LATENT_SIZE.get(found.in_channels, 32))
        return Description(describe_spatial(found, given, size, where), schedule)

    def convert(self, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """By diffusers' own converter."""
        return convert_spatial(state, config)


def _heads(found: Structure, given: Mapping[str, Any], where: str) -> tuple[int | None, dict[str, int]]:
    """`attention_head_dim` of the diffusers config, and what must be amended where heads are not all of one width."""
    if given.get("num_head_channels", -1) not in (-1, None):
        return int(given["num_head_channels"]), {}
    heads = given.get("num_heads")
    if heads in (-1, None):
        raise _unknown_heads(found, where)
    if heads == 1:
        return None, {}
    widths = {width for width, attends in zip(found.channels, found.attends, strict=True) if attends}
    widths.add(found.channels[-1])  # the middle attends too
    narrowest = min(widths) // heads
    return (narrowest, {}) if len(widths) == 1 else (narrowest, {"attention_heads": int(heads)})


def _unknown_heads(found: Structure, where: str) -> ArtifactError:
    return ArtifactError(
        f"The number of attention heads of a UNet with {found.channels} channels can't be told from its checkpoint",
        where=where,
        fix="Name the authors' YAML config, or the diffusers config.json, with --config FILE",
    )


def _heads_of(config: Mapping[str, Any], width: int) -> int:
    amended = (config.get(KEY) or {}).get("attention_heads")
    if amended:
        return int(amended)
    return 1 if config["attention_head_dim"] is None else width // int(config["attention_head_dim"])


def _attention(prefix: str, part: str, leaf: str, tensor: Tensor, heads: int) -> dict[str, Tensor]:
    """Tensors of an `AttentionBlock`; its 1-d convolutions become linear layers."""
    flat = tensor.flatten(1) if tensor.dim() == 3 else tensor
    if part == "norm":
        return {f"{prefix}.group_norm.{leaf}": flat}
    if part == "proj_out":
        return {f"{prefix}.to_out.0.{leaf}": flat}
    # QKVAttentionLegacy: rows are [heads, 3, width of a head].
    thirds = flat.unflatten(0, (heads, 3, -1)).unbind(1)
    return {f"{prefix}.to_{which}.{leaf}": third.flatten(0, 1) for which, third in zip("qkv", thirds, strict=True)}

"""UNets with `AttentionBlock`s (openai/guided-diffusion and its derivatives): config from shapes, conversion of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.config_extras import KEY
from dqtool.models.sources.original.openai_unet import Structure

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LATENT_MODELS", "convert_attention", "describe_attention", "unknown_heads"]

LATENT_MODELS: dict[tuple[int, ...], ForeignConfig] = {
    (224, 448, 672, 896): {"num_head_channels": 32, "linear_end": 0.0195},  # LDM-4: LSUN-Bedroom, CelebA-HQ, FFHQ
    (192, 384, 384, 768, 768): {"num_heads": 8, "linear_end": 0.0155},  # LDM-8: LSUN-Church
}
"""Settings of the published unconditional models that shapes don't determine, by the channels of their resolutions."""

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


def describe_attention(found: Structure, given: ForeignConfig, sample_size: int, where: str) -> ForeignConfig:
    """Return the `UNet2DModel` config of a `UNetModel` with `AttentionBlock`s.

    `given` holds `num_heads` or `num_head_channels`, as the authors' config names them.

    Raises:
        ArtifactError: `given` holds neither.
    """
    attention, amended = _heads(found, given, where)
    attend, plain = ("AttnDownBlock2D", "AttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
    if found.resnet_sampling:
        plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    levels = len(found.channels)
    kinds = [attend if attends else plain for attends in found.attends]
    sampling = "resnet" if found.resnet_sampling else "conv"
    downs = [down for down, _ in kinds]
    if found.resnet_sampling and not found.attends[-1]:
        downs[-1] = "DownBlock2D"  # the last resolution is not resampled
    ups = [up for _, up in reversed(kinds)]
    if found.resnet_sampling and not found.attends[0]:
        ups[levels - 1] = "UpBlock2D"
    config: dict[str, Any] = {
        "_class_name": "UNet2DModel",
        "sample_size": sample_size,
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
    return config


def convert_attention(
    tensors: Mapping[str, Tensor], config: ForeignConfig, where: str, together: bool
) -> dict[str, Tensor]:
    """Return the tensors of a `UNetModel` with `AttentionBlock`s under diffusers' names.

    With `together` the fused projection holds q, k and v of each head in a row (the legacy order), else all of q first.

    Raises:
        ArtifactError: the checkpoint holds a tensor that such a network does not have.
    """
    per_level = config["layers_per_block"] + 1
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
            converted.update(_attention(prefix, part, leaf, tensor, heads if together else None))
        else:
            converted[f"{prefix}.{_RESNET.get(part, part)}.{leaf}"] = tensor
    return converted


def _heads(found: Structure, given: ForeignConfig, where: str) -> tuple[int | None, dict[str, int]]:
    """Return `attention_head_dim` of the diffusers config, and the `original` entry where heads differ in width."""
    if given.get("num_head_channels", -1) not in (-1, None):
        return int(given["num_head_channels"]), {}
    heads = given.get("num_heads")
    if heads in (-1, None):
        raise unknown_heads(found, where)
    if heads == 1:
        return None, {}
    widths = {width for width, attends in zip(found.channels, found.attends, strict=True) if attends}
    widths.add(found.channels[-1])  # the middle block has attention too
    narrowest = min(widths) // heads
    return (narrowest, {}) if len(widths) == 1 else (narrowest, {"attention_heads": int(heads)})


def unknown_heads(found: Structure, where: str) -> ArtifactError:
    return ArtifactError(
        f"The number of attention heads of a UNet with {found.channels} channels can't be derived from its checkpoint",
        where=where,
        fix="Name the authors' YAML config, or the diffusers config.json, with --config FILE",
    )


def _heads_of(config: ForeignConfig, width: int) -> int:
    amended = (config.get(KEY) or {}).get("attention_heads")
    if amended:
        return int(amended)
    return 1 if config["attention_head_dim"] is None else width // int(config["attention_head_dim"])


def _attention(prefix: str, part: str, leaf: str, tensor: Tensor, heads: int | None) -> dict[str, Tensor]:
    """Return the tensors of an `AttentionBlock` as linear layers; `heads` is the number of heads in the legacy order."""
    flat = tensor.flatten(1) if tensor.dim() > 2 else tensor
    if part == "norm":
        return {f"{prefix}.group_norm.{leaf}": flat}
    if part == "proj_out":
        return {f"{prefix}.to_out.0.{leaf}": flat}
    if heads is None:  # QKVAttention
        return {f"{prefix}.to_{which}.{leaf}": third for which, third in zip("qkv", flat.chunk(3), strict=True)}
    # QKVAttentionLegacy: rows are [heads, 3, width of a head].
    thirds = flat.unflatten(0, (heads, 3, -1)).unbind(1)
    return {f"{prefix}.to_{which}.{leaf}": third.flatten(0, 1) for which, third in zip("qkv", thirds, strict=True)}

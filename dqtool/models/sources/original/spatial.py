"""UNets with spatial transformers: config from shapes, tensors through diffusers' own converter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.openai_unet import PREFIX, Structure, network_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert_spatial", "describe_spatial"]

Depth = int | list[int]


def describe_spatial(found: Structure, given: ForeignConfig, sample_size: int, where: str) -> ForeignConfig:
    """Return the `UNet2DConditionModel` config of a `UNetModel` with `SpatialTransformer`s.

    `given` holds `num_heads` or `num_head_channels`, as the authors' config names them.

    Raises:
        ArtifactError: diffusers has no equivalent network.
    """
    if found.scale_shift or found.resnet_sampling:
        raise ArtifactError(
            "dqtool reads UNets with spatial transformers only with plain residual blocks and convolutional resampling",
            where=where,
        )
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": found.in_channels,
        "out_channels": found.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in found.attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(found.attends)],
        "block_out_channels": found.channels,
        "layers_per_block": found.layers_per_block,
        "cross_attention_dim": found.context_dim,
        "attention_head_dim": _heads(found, given, where),
        "use_linear_projection": found.linear_projection,
        "num_class_embeds": found.classes,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        **_depths(found, where),
    }
    if any(found.only_cross):
        config["only_cross_attention"] = found.only_cross
    return config


def convert_spatial(state: Mapping[str, Tensor], config: ForeignConfig) -> dict[str, Tensor]:
    """Return the network's tensors under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixed = {PREFIX + name: tensor for name, tensor in network_tensors(state).items()}
    result: dict[str, Tensor] = convert_ldm_unet_checkpoint(prefixed, dict(config))
    return result


def _heads(found: Structure, given: ForeignConfig, where: str) -> int | list[int]:
    """Return `attention_head_dim` of a `UNet2DConditionModel`, which is the number of heads in spite of its name."""
    width = given.get("num_head_channels")
    if width in (-1, None):
        return int(given["num_heads"])
    attending = [channels for channels, attends in zip(found.channels, found.attends, strict=True) if attends]
    if any(channels % int(width) for channels in attending):
        raise ArtifactError(f"{attending} channels don't divide into heads of {width}", where=where)
    return [max(channels // int(width), 1) for channels in found.channels]


def _depths(found: Structure, where: str) -> ForeignConfig:
    """Return the config entries for transformer blocks per attention: one number, one per resolution, or per layer (SSD-1B)."""
    levels = len(found.channels)
    depths: list[Depth] = [1] * levels
    attending = [level for level in range(levels) if found.attends[level]]
    for level in attending:
        depths[level] = _one(found.down_depths[level])
    entries: dict[str, Any] = {}
    if found.mid_depth is None:
        entries["mid_block_type"] = "UNetMidBlock2D"
    elif not found.attends[-1]:
        depths[-1] = found.mid_depth  # the middle takes its depth from the last resolution
    elif depths[-1] != found.mid_depth:
        raise ArtifactError(
            f"diffusers has no UNet with {found.mid_depth} transformer blocks in the middle and {depths[-1]} before it",
            where=where,
        )
    mirrored = [_one(found.up_depths[levels - 1 - level]) for level in range(levels)]
    if any(mirrored[level] != depths[level] for level in attending):
        per_layer = [[depth] * found.layers_per_block if isinstance(depth, int) else depth for depth in depths]
        entries["transformer_layers_per_block"] = [
            value if level in attending else 1 for level, value in enumerate(per_layer)
        ]
        entries["reverse_transformer_layers_per_block"] = [
            [depth or 1 for depth in found.up_depths[level]] for level in range(levels)
        ]
        return entries
    block_depths = [depths[level] for level in attending] + ([] if found.mid_depth is None else [found.mid_depth])
    uniform = all(depth == block_depths[0] for depth in block_depths)
    return {"transformer_layers_per_block": block_depths[0] if uniform and block_depths else depths, **entries}


def _one(depths: list[int]) -> Depth:
    """Return one number for layers that agree, else the list."""
    return depths[0] if len(set(depths)) == 1 else list(depths)

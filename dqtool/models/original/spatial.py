"""UNets with spatial transformers: config from shapes, tensors through diffusers' own converter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError
from dqtool.models.original.openai_unet import PREFIX, Structure, network_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["convert_spatial", "describe_spatial"]


def describe_spatial(found: Structure, given: Mapping[str, Any], sample_size: int, where: str) -> dict[str, Any]:
    """The `UNet2DConditionModel` config of a `UNetModel` with `SpatialTransformer`s.

    `given` holds `num_heads` or `num_head_channels`, as the authors' config names them.

    Raises:
        ArtifactError: diffusers has no equal of the network.
    """
    if found.scale_shift or found.resnet_sampling:
        raise ArtifactError(
            "dqtool reads UNets with spatial transformers only with plain residual blocks and convolutional resampling",
            where=where,
        )
    heads: int | list[int]
    if given.get("num_head_channels", -1) not in (-1, None):
        heads = [width // int(given["num_head_channels"]) for width in found.channels]
    else:
        heads = int(given["num_heads"])
    depths = [max(depth, 1) for depth in found.depths]
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": sample_size,
        "in_channels": found.in_channels,
        "out_channels": found.out_channels,
        "down_block_types": ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in found.attends],
        "up_block_types": ["CrossAttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(found.attends)],
        "block_out_channels": found.channels,
        "layers_per_block": found.layers_per_block,
        "cross_attention_dim": found.context_dim,
        "attention_head_dim": heads,
        "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
        "use_linear_projection": found.linear_projection,
        "num_class_embeds": found.classes,
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
    }


def convert_spatial(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network under diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefixed = {PREFIX + name: tensor for name, tensor in network_tensors(state).items()}
    return convert_ldm_unet_checkpoint(prefixed, dict(config))

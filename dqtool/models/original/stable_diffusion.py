"""CompVis/stable-diffusion and what follows its single-file layout: SD 1.x, 2.x and SDXL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dqtool.models.original.layout import Description, Layout, Shapes, register
from dqtool.models.original.openai_unet import network_names, network_shapes, scaled_linear, structure, unet_parameters
from dqtool.models.original.spatial import convert_spatial, describe_spatial

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StableDiffusion"]

_HEADS: dict[int, dict[str, int]] = {1024: {"num_head_channels": 64}, 2048: {"num_head_channels": 64}}
"""Heads by the width of the text encoder's states: SD 2.x and SDXL; SD 1.x (768) and LDM text-to-image (1280) have 8."""

_EIGHT = {"num_heads": 8}
_SDXL = "label_emb.0.0.weight"


@register
class StableDiffusion(Layout):
    """`UNetModel` with `SpatialTransformer`s that read the states of a text encoder."""

    name = "stable-diffusion"
    title = "CompVis/stable-diffusion"

    def matches(self, shapes: Shapes) -> bool:
        """By cross-attention in numbered blocks; a context of classes is `LatentDiffusionByClass`'s."""
        network = network_shapes(shapes)
        contexts = [shape[1] for name, shape in network.items() if name.endswith("attn2.to_k.weight")]
        by_class = "cond_stage_model.embedding.weight" in shapes
        return bool(contexts) and contexts[0] != 512 and not by_class

    def network(self, names: Iterable[str]) -> set[str]:
        """Without the first stage, the conditioner and the averaged copies."""
        return network_names(names)

    def describe(self, shapes: Shapes, published: Mapping[str, Any] | None, where: str) -> Description:
        """Heads follow from the text encoder unless `published` names them."""
        network = network_shapes(shapes)
        found = structure(network, where)
        given = {**_HEADS.get(found.context_dim or 0, _EIGHT), **unet_parameters(published)}
        size = int(given.get("image_size") or 64)
        config = describe_spatial(found, given, 128 if _SDXL in network else size, where)
        if _SDXL in network:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": network[_SDXL][1],
            }
        return Description(config, scaled_linear(published, 0.00085, 0.012))

    def convert(self, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> dict[str, Tensor]:
        """By diffusers' own converter."""
        return convert_spatial(state, config)

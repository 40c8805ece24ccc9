"""Layouts of CompVis/latent-diffusion: unconditional models (LDM-4 bedroom, LDM-8 church) and LDM-4 ImageNet (by class)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.attention_unet import (
    LATENT_MODELS,
    convert_attention,
    describe_attention,
    unknown_heads,
)
from dqtool.models.sources.original.layout import Description, Known, Shapes, register
from dqtool.models.sources.original.openai_unet import (
    CompVisLayout,
    network_shapes,
    network_tensors,
    scaled_linear,
    unet_parameters,
    unet_structure,
)
from dqtool.models.sources.original.spatial import convert_spatial, describe_spatial

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LatentDiffusion", "LatentDiffusionByClass"]

_CIN256 = (192, 384, 576, 960)
"""Channels of the published class-conditional LDM-4, which has a single head."""

_LATENT_SIZE = {3: 64, 4: 32}
"""Side of the latents of 256x256 images by their number of channels (first stages of factor 4 and 8)."""


@register
class LatentDiffusion(CompVisLayout):
    """`UNetModel` with `AttentionBlock`s (`ldm/modules/diffusionmodules/openaimodel.py`)."""

    name = "latent-diffusion"
    title = "CompVis/latent-diffusion, unconditional"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether numbered blocks have attention with a fused projection of q, k and v."""
        network = network_shapes(shapes)
        return bool(network) and any(name.endswith(".1.qkv.weight") for name in network)

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule; heads and latent size come from `published`, else from the model of these channels."""
        network = network_shapes(shapes)
        found = unet_structure(network, where)
        like = LATENT_MODELS.get(tuple(found.channels), {})
        schedule = scaled_linear(known.published, 0.0015, like.get("linear_end", 0.0195))
        if known.config is not None:
            return Description(dict(known.config), schedule)
        given = {**like, **unet_parameters(known.published)}
        if given.get("use_new_attention_order"):
            raise ArtifactError("dqtool does not read models with use_new_attention_order", where=where)
        size = int(given.get("image_size") or _LATENT_SIZE.get(found.in_channels, 32))
        return Description(describe_attention(found, given, size, where), schedule)

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Rename the tensors and split the fused projection, which holds q, k and v of each head in a row."""
        return convert_attention(network_tensors(state), config, where, together=True)


@register
class LatentDiffusionByClass(CompVisLayout):
    """`UNetModel` with `SpatialTransformer`s that read the embedding of a class."""

    name = "latent-diffusion-class"
    title = "CompVis/latent-diffusion, class-conditional"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether cross-attention reads a context of the width of LDM-4 ImageNet's class embedding, or the file has that."""
        network = network_shapes(shapes)
        contexts = [shape[1] for name, shape in network.items() if name.endswith("attn2.to_k.weight")]
        return bool(contexts) and (contexts[0] == 512 or "cond_stage_model.embedding.weight" in shapes)

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule; heads come from the authors' YAML, and cin256-v2 has one.

        Raises:
            ArtifactError: the number of heads is unknown.
        """
        found = unet_structure(network_shapes(shapes), where)
        schedule = scaled_linear(known.published, 0.0015, 0.0195)
        if known.config is not None:
            return Description(dict(known.config), schedule)
        like = {"num_heads": 1} if tuple(found.channels) == _CIN256 else {}
        given = {**like, **unet_parameters(known.published)}
        if not {"num_heads", "num_head_channels"} & given.keys():
            raise unknown_heads(found, where)
        size = int(given.get("image_size") or _LATENT_SIZE.get(found.in_channels, 32))
        return Description(describe_spatial(found, given, size, where), schedule)

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Convert the tensors with diffusers' own converter."""
        return convert_spatial(state, config)

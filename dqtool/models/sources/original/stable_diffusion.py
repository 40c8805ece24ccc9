"""Layout of Stable Diffusion: 1.x, 2.x, SDXL, its refiner, their inpainting and editing variants, and LDM text-to-image.

Shapes identify the published architecture; a table of these holds what shapes don't determine (heads, latent size,
schedule). A network of another architecture needs the authors' YAML config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.sources.original.layout import Description, Known, Shapes, register
from dqtool.models.sources.original.openai_unet import (
    CompVisLayout,
    Structure,
    network_shapes,
    scaled_linear,
    unet_parameters,
    unet_structure,
)
from dqtool.models.sources.original.prediction import Prediction, found_prediction, with_prediction
from dqtool.models.sources.original.spatial import convert_spatial, describe_spatial

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PUBLISHED", "KnownArchitecture", "StableDiffusion", "published_schedule"]

LATENT = 8
"""Pixels per latent in each dimension."""


@dataclass(frozen=True)
class KnownArchitecture:
    """A published architecture: the properties that identify it, and config entries that shapes don't determine.

    `channels` are those of the network's input; `prediction` is None where the published models differ in it. `size` is the
    side of an image by prediction type, `betas` the ends of the schedule.
    """

    title: str
    context: int
    linear: bool
    channels: tuple[int, ...]
    heads: Mapping[str, int]
    size: int
    prediction: str | None = "epsilon"
    vector: int | None = None
    size_of_v: int | None = None
    betas: tuple[float, float] = (0.00085, 0.012)


_EIGHT, _BY_64 = {"num_heads": 8}, {"num_head_channels": 64}

PUBLISHED = (
    KnownArchitecture("Stable Diffusion 1", 768, False, (4, 8, 9), _EIGHT, 512),
    KnownArchitecture("LDM text-to-image", 1280, False, (4,), _EIGHT, 256),
    KnownArchitecture("Stable Diffusion 2", 1024, True, (4,), _BY_64, 512, None, size_of_v=768),
    KnownArchitecture("Stable Diffusion 2 inpainting and depth", 1024, True, (5, 9), _BY_64, 512),
    KnownArchitecture("Stable Diffusion 2 unCLIP", 1024, True, (4,), _BY_64, 768, "v_prediction", vector=2048),
    KnownArchitecture("Stable Diffusion 2 unCLIP-L", 1024, True, (4,), _BY_64, 768, "v_prediction", vector=1536),
    KnownArchitecture(
        "Stable Diffusion x4 upscaler", 1024, True, (7,), _EIGHT, 1024, "v_prediction", betas=(0.0001, 0.02)
    ),
    KnownArchitecture("SDXL", 2048, True, (4, 8, 9), _BY_64, 1024, vector=2816),
    KnownArchitecture("SDXL refiner", 1280, True, (4,), _BY_64, 1024, vector=2560),
)
"""Architectures with heads and sizes from their published configs. SD 1 has 8 heads of any width; SD 2, SDXL and its refiner
have heads of 64 channels; the upscaler has 8 heads. SSD-1B, Segmind-Vega and KOALA have SDXL's architecture."""

_ASKS = "what the network predicts can't be derived from a {title} checkpoint: its base models predict the noise (epsilon), its 768-pixel models v"


@register
class StableDiffusion(CompVisLayout):
    """`UNetModel` with `SpatialTransformer`s that read the states of a text encoder."""

    name = "stable-diffusion"
    title = "Stable Diffusion"

    def matches(self, shapes: Shapes) -> bool:
        """Return whether numbered blocks have cross-attention on text; class contexts belong to `LatentDiffusionByClass`."""
        network = network_shapes(shapes)
        contexts = [shape[1] for name, shape in network.items() if name.endswith("attn2.to_k.weight")]
        by_class = "cond_stage_model.embedding.weight" in shapes
        return bool(contexts) and contexts[0] != 512 and not by_class

    def describe(self, shapes: Shapes, known: Known, where: str) -> Description:
        """Return config and schedule from the authors' YAML, else from the published architecture of these shapes.

        Raises:
            ArtifactError: no published architecture matches, and the number of heads is unknown.
        """
        found = unet_structure(network_shapes(shapes), where)
        like, given = architecture_of(found), unet_parameters(known.published)
        if like is None and known.config is None and not {"num_heads", "num_head_channels"} & given.keys():
            raise ArtifactError(
                f"This UNet (context of {found.context_dim}, {found.in_channels} channels in) is of no published "
                "architecture, and its attention heads can't be derived from shapes",
                where=where,
                fix="Name the authors' YAML config, or the diffusers config.json, with --config FILE",
            )
        prediction = found_prediction(shapes, known.published)
        kind = known.prediction_type or prediction.kind or (like.prediction if like else "epsilon")
        explicit = prediction != Prediction()
        prediction = Prediction(kind, prediction.zero_snr, None if known.prediction_type else prediction.edm)
        if prediction.zero_snr and kind == "epsilon":
            raise ArtifactError(
                "A schedule without signal at its end (ztsnr) can't be sampled by a network that predicts the noise",
                where=where,
                fix="Leave --prediction-type out, or say v_prediction",
            )
        start, end = like.betas if like else (0.00085, 0.012)
        schedule = with_prediction(scaled_linear(known.published, start, end), prediction)
        unknown_schedule = _ASKS.format(title=like.title) if kind is None and like is not None else None
        if known.config is not None:
            return Description(dict(known.config), schedule, unknown_schedule, explicit)
        size = _side(like, kind) if like else int(given.get("image_size") or 512 // LATENT)
        heads = given if like is None else {**like.heads, **_heads(given)}
        config = {**describe_spatial(found, heads, size, where), **_vector(found)}
        return Description(config, schedule, unknown_schedule, explicit)

    def convert(self, state: Mapping[str, Tensor], config: ForeignConfig, where: str) -> dict[str, Tensor]:
        """Convert the tensors with diffusers' own converter."""
        return convert_spatial(state, config)


def architecture_of(found: Structure) -> KnownArchitecture | None:
    """Return the published architecture of this structure; None where there is none."""
    for each in PUBLISHED:
        same = (each.context, each.linear, each.vector) == (
            found.context_dim,
            found.linear_projection,
            found.vector_dim,
        )
        if same and found.in_channels in each.channels:
            return each
    return None


def published_schedule(config: ForeignConfig) -> tuple[ForeignConfig, str | None] | None:
    """Return the schedule of a bare `UNet2DConditionModel` of a published architecture, and a description of its unknown part.

    The description is None where everything is known. Returns None for a network of no published architecture.
    """
    for each in PUBLISHED:
        same = (each.context, each.linear, each.vector) == (
            config.get("cross_attention_dim"),
            bool(config.get("use_linear_projection", False)),
            config.get("projection_class_embeddings_input_dim"),
        )
        if same and config.get("in_channels") in each.channels:
            schedule = with_prediction(scaled_linear(None, *each.betas), Prediction(each.prediction))
            return schedule, _ASKS.format(title=each.title) if each.prediction is None else None
    return None


def _heads(given: ForeignConfig) -> ForeignConfig:
    """Return the authors' entry for heads, under one of two keys; empty where there is none."""
    if given.get("num_head_channels") not in (-1, None):
        return {"num_head_channels": given["num_head_channels"]}
    if given.get("num_heads") not in (-1, None):
        return {"num_head_channels": None, "num_heads": given["num_heads"]}
    return {}


def _side(like: KnownArchitecture, kind: str | None) -> int:
    """Return the side of the latents. (The `image_size` of these authors' YAML files is unused and wrong.)"""
    return (like.size_of_v or like.size if kind == "v_prediction" else like.size) // LATENT


def _vector(found: Structure) -> ForeignConfig:
    """Return the config entries of embeddings that are added to the timestep's: SDXL's text and sizes, unCLIP's image."""
    if found.vector_dim is None:
        return {}
    entries = {"projection_class_embeddings_input_dim": found.vector_dim}
    if found.context_dim in (1280, 2048):
        return {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, **entries}
    return {"class_embed_type": "projection", **entries}

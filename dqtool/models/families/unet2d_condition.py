"""`UNet2DConditionModel`: Stable Diffusion 1 and 2, SDXL, and LDM-4 for ImageNet (a class embedding as the context)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool import report
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import ArtifactError
from dqtool.models.conditions.conditioning import (
    CONTEXT_TOKENS,
    IMAGE_CONDITION,
    Conditions,
    Request,
    class_contexts,
    missing_conditions,
    text_conditions,
)
from dqtool.models.conditions.images import beside_latents
from dqtool.models.families.base import Family, image_side, register, small_sample

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["UNet2DCondition", "guidance_embedding"]

TIME_IDS = 6
"""Number of SDXL's size conditions: original size, crop, target size."""
REFINER_TIME_IDS = 5
"""Number of size conditions of SDXL's refiner: original size, crop, aesthetic score."""
AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5
"""Default aesthetic scores of the refiner's pipeline, with and without the prompt."""
EDITING_GUIDANCE = 1.5
"""Second weight of guidance of networks that edit images, towards the image."""
LCM_GUIDANCE = 8.5
"""Guidance of `LatentConsistencyModelPipeline`, embedded in the network's time."""


@register
class UNet2DCondition(Family):
    """UNets with cross-attention, and with SDXL's pooled text and sizes where the config requires them."""

    name = "unet2d_condition"
    class_name = "UNet2DConditionModel"
    block_classes = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
    guidance = 7.5
    class_guidance = 3.0
    sdxl_guidance = 5.0

    def proof_config(self, config: ForeignConfig) -> ForeignConfig:
        """Return the config with small samples."""
        return small_sample(config)

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a random context `[N, S, D]` and the other conditions that the config requires.

        Raises:
            ArtifactError: the config requires conditions that dqtool does not know, such as image embeddings.
        """
        _refuse_unknown(config)
        given: dict[str, Tensor] = {}
        width = config.get("encoder_hid_dim") or config.get("cross_attention_dim", 1280)
        if not isinstance(width, int):
            if len(set(width)) > 1:
                raise ArtifactError("Contexts of several widths are not supported", where="cross_attention_dim")
            width = width[0]
        given["encoder_hidden_states"] = torch.randn(batch, config.get(CONTEXT_TOKENS, 77), width, generator=generator)
        if config.get("num_class_embeds"):
            given["class_labels"] = torch.randint(0, config["num_class_embeds"], (batch,), generator=generator)
        if config.get("addition_embed_type") == "text_time":
            pooled = _embedded_width(config) - _count_time_ids(config) * config["addition_time_embed_dim"]
            given["text_embeds"] = torch.randn(batch, pooled, generator=generator)
            given["time_ids"] = self._time_ids(config, None).expand(batch, -1)
        if config.get("time_cond_proj_dim"):
            given["timestep_cond"] = guidance_embedding(LCM_GUIDANCE, config["time_cond_proj_dim"]).expand(batch, -1)
        if self.condition_channels(config):
            _, height, width = self.sample_shape(config)
            given[IMAGE_CONDITION] = torch.randn(
                batch, self.condition_channels(config), height, width, generator=generator
            )
        return given

    def condition_channels(self, config: ForeignConfig) -> int:
        """Return 5 of 9 channels for inpainting (mask and masked image), 4 of 8 for editing (the image), else 0."""
        return max(int(config["in_channels"]) - int(config.get("out_channels", config["in_channels"])), 0)

    def default_image_guidance(self, config: ForeignConfig) -> float | None:
        """Return the 1.5 of `StableDiffusionInstructPix2PixPipeline` for networks that edit images, else None."""
        return EDITING_GUIDANCE if self.condition_channels(config) == int(config.get("out_channels", 0)) else None

    def complete(self, config: ForeignConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the size conditions of uncropped images."""
        if config.get("addition_embed_type") == "text_time":
            return {"time_ids": self._time_ids(config, None).expand(len(next(iter(given.values()))), -1)}
        return {}

    def default_guidance(self, config: ForeignConfig) -> float:
        """Return 7.5, or 5 for SDXL."""
        return self.sdxl_guidance if config.get("addition_embed_type") == "text_time" else self.guidance

    def embeds_guidance(self, config: ForeignConfig) -> bool:
        """Return whether guidance is added to the time embedding, as in latent consistency models."""
        return bool(config.get("time_cond_proj_dim"))

    def embed_guidance(self, config: ForeignConfig, guidance: float, rows: int) -> dict[str, Tensor]:
        """Return `timestep_cond` `[rows, time_cond_proj_dim]`."""
        return {"timestep_cond": guidance_embedding(guidance, config["time_cond_proj_dim"]).expand(rows, -1)}

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward; SDXL's two go into `added_cond_kwargs`, and `x` already has `IMAGE_CONDITION`."""
        plain = {k: v for k, v in conditions.items() if k not in ("text_embeds", "time_ids", IMAGE_CONDITION)}
        if "text_embeds" in conditions:
            added = {"text_embeds": conditions["text_embeds"], "time_ids": conditions["time_ids"]}
            return {"sample": x, "timestep": timestep, **plain, "added_cond_kwargs": added}
        return {"sample": x, "timestep": timestep, **plain}

    def input_properties(self, companions: Companions) -> ForeignConfig:
        """Return the length of a context: one token for a class, the tokenizer's length for a text."""
        if companions.has("class_embedder"):
            return {CONTEXT_TOKENS: 1}
        tokenizer = next((name for name in ("tokenizer", "tokenizer_2") if companions.has(name)), None)
        if tokenizer is None:
            return {}
        length = companions.json(f"{tokenizer}/tokenizer_config.json").get("model_max_length", 77)
        return {CONTEXT_TOKENS: length} if 0 < length < 10_000 else {}

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return contexts of the classes, or of the prompts, made by the pipeline's own models."""
        if companions is not None and companions.has("class_embedder"):
            return class_contexts(request, companions, self.class_guidance)
        if companions is None or not companions.encodes_text:
            return super().make_conditions(config, request, companions)
        xl = config.get("addition_embed_type") == "text_time"

        def encode(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            if not hasattr(pipeline, "encode_prompt"):  # pipelines that edit images
                given, without = (
                    pipeline._encode_prompt(texts, pipeline.device, 1, False) for texts in (prompts, [""])
                )
                return {"encoder_hidden_states": given}, {"encoder_hidden_states": without}
            if not xl:
                given, without = pipeline.encode_prompt(prompts, pipeline.device, 1, True)
                return {"encoder_hidden_states": given}, {"encoder_hidden_states": without[:1]}
            given, without, pooled, no_pooled = pipeline.encode_prompt(prompts, device=pipeline.device)
            ids = self._time_ids(config, companions)
            no_ids = self._time_ids(config, companions, NEGATIVE_AESTHETIC)
            return (
                {"encoder_hidden_states": given, "text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)},
                {"encoder_hidden_states": without[:1], "text_embeds": no_pooled[:1], "time_ids": no_ids},
            )

        default = self.default_guidance(config)
        if str(companions.index.get("_class_name")).startswith("LatentConsistencyModel"):
            default = LCM_GUIDANCE
        found = text_conditions(request, companions, default, encode, self.embedder(config))
        return self._with_images(found, config, request)

    def _with_images(self, found: Conditions, config: ForeignConfig, request: Request) -> Conditions:
        """Return the conditions of prompts, with the image conditions of a network that takes some: given or random ones.

        Raises:
            UsageError: the network takes image conditions, there are none, and random ones are not allowed.
        """
        channels = self.condition_channels(config)
        if not channels:
            return found
        if request.images is not None:
            found = found.repeated(min(request.count, len(request.images.images)))
            beside = beside_latents(request.images, channels, len(found), request.seed)
            rows = torch.arange(len(found)) % len(beside)
            return replace(found, table={**found.table, IMAGE_CONDITION: beside[rows]})
        drawn = self.conditions(config, len(found), torch.Generator().manual_seed(request.seed))[IMAGE_CONDITION]
        if not request.random:
            table = {**found.table, IMAGE_CONDITION: drawn}
            raise missing_conditions(
                "This network takes image conditions (mask, image), which prompts don't provide; --images DIR does",
                table,
            )
        report.warn("image conditions (mask, image) are drawn at random: quality with real ones may be lower")
        return replace(found, table={**found.table, IMAGE_CONDITION: drawn}, random=True)

    def _time_ids(self, config: ForeignConfig, companions: Companions | None, score: float = AESTHETIC) -> Tensor:
        """Return `[1, 6]` for an uncropped image of the size that is generated; `[1, 5]` with a score for a refiner."""
        size = image_side(self.sample_shape(config), companions)
        last = [score] if _count_time_ids(config) == REFINER_TIME_IDS else size
        return torch.tensor([[*size, 0, 0, *last]], dtype=torch.float32)


def guidance_embedding(guidance: float, width: int) -> Tensor:
    """Return the embedding `[1, width]` of a guidance as in `LatentConsistencyModelPipeline`.

    It holds sines and cosines of 1000 (guidance - 1).
    """
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / (half - 1)))
    angles = torch.tensor([[guidance - 1.0]]) * 1000.0 * frequencies
    embedded = torch.cat([angles.sin(), angles.cos()], 1)
    return F.pad(embedded, (0, width % 2))


def _embedded_width(config: ForeignConfig) -> int:
    return int(config["projection_class_embeddings_input_dim"])


def _count_time_ids(config: ForeignConfig) -> int:
    """Return the number of size conditions: 6, or 5 for a refiner, whose context and pooled text have equal widths."""
    rest = _embedded_width(config) - REFINER_TIME_IDS * int(config["addition_time_embed_dim"])
    return REFINER_TIME_IDS if rest == config.get("cross_attention_dim") else TIME_IDS


def _refuse_unknown(config: ForeignConfig) -> None:
    for key, known in (
        ("addition_embed_type", (None, "text_time")),
        ("class_embed_type", (None,)),
        ("encoder_hid_dim_type", (None, "text_proj")),
    ):
        if config.get(key) not in known:
            raise ArtifactError(
                f"UNets with {key} '{config[key]}' are not supported",
                where=f"model config, key {key}",
                fix="Supported are text, class labels and SDXL's added conditions",
            )

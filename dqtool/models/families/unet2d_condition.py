"""`UNet2DConditionModel`: Stable Diffusion 1 and 2, SDXL, and LDM-4 for ImageNet (a class embedding as the context)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool.errors import ArtifactError
from dqtool.models.conditioning import CONTEXT_TOKENS, Conditions, Request, class_contexts, text_conditions
from dqtool.models.families.base import Family, register, small_sample, square_sample

if TYPE_CHECKING:
    from dqtool.models.companions import Companions

__all__ = ["UNet2DCondition"]

TIME_IDS = 6
"""SDXL's numbers beside the text: original size, crop, target size."""


@register
class UNet2DCondition(Family):
    """UNets with cross-attention; SDXL's pooled text and sizes where the config asks for them."""

    name = "unet2d_condition"
    class_name = "UNet2DConditionModel"
    block_classes = ("ResnetBlock2D", "BasicTransformerBlock", "Attention")
    guidance = 7.5
    class_guidance = 3.0
    sdxl_guidance = 5.0

    def sample_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """From `in_channels` and `sample_size`."""
        return square_sample(config)

    def proof_config(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Small samples."""
        return small_sample(config)

    def conditions(self, config: Mapping[str, Any], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """A random context `[N, S, D]`, and what else the config calls for.

        Raises:
            ArtifactError: it calls for images or other conditions that dqtool does not know.
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
            pooled = config["projection_class_embeddings_input_dim"] - TIME_IDS * config["addition_time_embed_dim"]
            given["text_embeds"] = torch.randn(batch, pooled, generator=generator)
            given["time_ids"] = _time_ids([8 * side for side in self.sample_shape(config)[1:]]).expand(batch, -1)
        return given

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """SDXL's two go into `added_cond_kwargs`."""
        plain = {k: v for k, v in conditions.items() if k not in ("text_embeds", "time_ids")}
        if "text_embeds" in conditions:
            added = {"text_embeds": conditions["text_embeds"], "time_ids": conditions["time_ids"]}
            return {"sample": x, "timestep": timestep, **plain, "added_cond_kwargs": added}
        return {"sample": x, "timestep": timestep, **plain}

    def hints(self, companions: Companions) -> dict[str, Any]:
        """How long a context is: one token for a class, the tokenizer's length for a text."""
        if companions.has("class_embedder"):
            return {CONTEXT_TOKENS: 1}
        length = companions.json("tokenizer/tokenizer_config.json").get("model_max_length", 77)
        return {CONTEXT_TOKENS: length} if companions.has("tokenizer") and 0 < length < 10_000 else {}

    def ask(self, config: Mapping[str, Any], request: Request, companions: Companions | None) -> Conditions:
        """Contexts of the classes, or of the prompts, with the pipeline's own models."""
        if companions is not None and companions.has("class_embedder"):
            return class_contexts(request, companions, self.class_guidance)
        if companions is not None and companions.has("text_encoder"):
            xl = config.get("addition_embed_type") == "text_time"
            size = companions.image_shape(self.sample_shape(config))[1:]

            def encode(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
                if not xl:
                    given, without = pipeline.encode_prompt(prompts, pipeline.device, 1, True)
                    return {"encoder_hidden_states": given}, {"encoder_hidden_states": without[:1]}
                given, without, pooled, no_pooled = pipeline.encode_prompt(prompts, device=pipeline.device)
                ids = _time_ids(size)
                return (
                    {"encoder_hidden_states": given, "text_embeds": pooled, "time_ids": ids.expand(len(prompts), -1)},
                    {"encoder_hidden_states": without[:1], "text_embeds": no_pooled[:1], "time_ids": ids},
                )

            return text_conditions(request, companions, self.sdxl_guidance if xl else self.guidance, encode)
        return super().ask(config, request, companions)


def _time_ids(size: Sequence[int]) -> Tensor:
    """`[1, 6]`: an uncropped image of the height and width that are generated."""
    return torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)


def _refuse_unknown(config: Mapping[str, Any]) -> None:
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

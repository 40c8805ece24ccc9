"""`PixArtTransformer2DModel`: PixArt-alpha and -sigma, with T5 text through cross-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.models.conditions.conditioning import CONTEXT_TOKENS, Conditions, Request, text_conditions
from dqtool.models.families.base import Family, image_side, register, square_sample, timestep_vector

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["PixArt"]

SIZES = ("resolution", "aspect_ratio")


@register
class PixArt(Family):
    """Text-conditional transformers with one shared adaptive norm; larger ones also take the image's size."""

    name = "pixart"
    class_name = "PixArtTransformer2DModel"
    block_classes = ("BasicTransformerBlock",)
    sample = "hidden_states"
    traced_size = True
    guidance = 4.5

    def sample_shape(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return `(C, H, W)` from `in_channels` and `sample_size`."""
        return square_sample({"sample_size": 128, "in_channels": 4, **config})

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return a random caption `[N, S, D]` of full length, and sizes where the config requires them."""
        width = config.get("caption_channels") or config.get("cross_attention_dim", 1152)
        tokens = config.get(CONTEXT_TOKENS, 120)
        given = {
            "encoder_hidden_states": torch.randn(batch, tokens, width, generator=generator),
            "encoder_attention_mask": torch.ones(batch, tokens),
        }
        return given | _sizes(config, batch, 8 * self.sample_shape(config)[1])

    def complete(self, config: ForeignConfig, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mask of full-length captions, and sizes where the config requires them."""
        text = given["encoder_hidden_states"]
        mask = {"encoder_attention_mask": torch.ones(text.shape[:2])}
        return mask | _sizes(config, len(text), 8 * self.sample_shape(config)[1])

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return prompts encoded by the pipeline's T5."""
        if companions is None or not companions.encodes_text:
            return super().make_conditions(config, request, companions)

        height = image_side(self.sample_shape(config), companions)[0]

        def encode(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            given, mask, without, no_mask = pipeline.encode_prompt(prompts, device=pipeline.device)
            return (
                {"encoder_hidden_states": given, "encoder_attention_mask": mask.float()}
                | _sizes(config, len(prompts), height),
                {"encoder_hidden_states": without[:1], "encoder_attention_mask": no_mask[:1].float()}
                | _sizes(config, 1, height),
            )

        return text_conditions(request, companions, self.guidance, encode)

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward, with sizes in `added_cond_kwargs` and the timestep as `[N]`."""
        plain = {k: v for k, v in conditions.items() if k not in SIZES}
        added = {k: conditions.get(k) for k in SIZES}
        return {
            "hidden_states": x,
            "timestep": timestep_vector(timestep, x),
            **plain,
            "added_cond_kwargs": added,
        }


def _sizes(config: ForeignConfig, batch: int, side: int) -> dict[str, Tensor]:
    """Return `resolution` `[N, 2]` and `aspect_ratio` `[N, 1]` of a square image; empty for networks that take no sizes."""
    size = config.get("sample_size", 128)
    asked = config.get("use_additional_conditions")
    if not (size == 128 if asked is None else asked):
        return {}
    return {"resolution": torch.tensor([[float(side)] * 2]).repeat(batch, 1), "aspect_ratio": torch.ones(batch, 1)}

"""`FluxTransformer2DModel`: FLUX.1, two streams and then one, rotary positions; guidance, if any, is an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.models.conditions.conditioning import CONTEXT_TOKENS, SAMPLE_SIZE, Conditions, Request, text_conditions
from dqtool.models.families.base import Family, register, timestep_vector

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["Flux"]

PATCH = 2
"""Side of the squares of latents that are packed into one token."""


@register
class Flux(Family):
    """Flow-matching transformers. `x` is the latent `[N, C, H, W]`; the network takes it packed, `[N, HW/4, 4C]`, and the
    timestep in [0, 1]."""

    name = "flux"
    class_name = "FluxTransformer2DModel"
    block_classes = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    sample = "hidden_states"
    timestep_divisor = 1000.0
    embedded_guidance = 3.5
    scheduler: ClassVar[ForeignConfig | None] = {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "use_dynamic_shifting": True,
    }

    def sample_shape(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return `(C, H, W)`; the config has no size, so the default is 128x128 latents (1024 pixels)."""
        size = config.get(SAMPLE_SIZE, 128)
        return int(config.get("in_channels", 64)) // PATCH**2, size, size

    def tokens(self, config: ForeignConfig) -> int:
        """Return the number of packed squares."""
        _, height, width = self.sample_shape(config)
        return (height // PATCH) * (width // PATCH)

    def prediction_row(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return the shape of one number per channel of a packed square."""
        return 1, self.sample_shape(config)[0] * PATCH**2

    def per_channel(self, values: Tensor, fill: float, config: ForeignConfig) -> Tensor:
        """Repeat each channel's number for all places of a square."""
        return values.repeat_interleave(PATCH**2, 1)[:, None]

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random text `[N, S, D]`, pooled text, and the guidance of distilled models."""
        tokens, width = config.get(CONTEXT_TOKENS, 512), config.get("joint_attention_dim", 4096)
        given = {
            "encoder_hidden_states": torch.randn(batch, tokens, width, generator=generator),
            "pooled_projections": torch.randn(batch, config.get("pooled_projection_dim", 768), generator=generator),
        }
        if self.embeds_guidance(config):
            given |= self.embed_guidance(config, self.default_guidance(config), batch)
        return given

    def default_guidance(self, config: ForeignConfig) -> float:
        """Return 3.5 for models that take guidance as an input; FLUX.1-schnell has none."""
        return self.embedded_guidance if self.embeds_guidance(config) else 1.0

    def embeds_guidance(self, config: ForeignConfig) -> bool:
        """Return whether the network takes guidance as an input, as FLUX.1-dev does."""
        return bool(config.get("guidance_embeds"))

    def embed_guidance(self, config: ForeignConfig, guidance: float, rows: int) -> dict[str, Tensor]:
        """Return `guidance` `[rows]`."""
        return {"guidance": torch.full((rows,), guidance)}

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return prompts encoded by the pipeline's CLIP and T5, with the guidance input of a distilled model."""
        if companions is None or not companions.encodes_text:
            return super().make_conditions(config, request, companions)

        def encode(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            given, pooled, _ = pipeline.encode_prompt(prompts, None, device=pipeline.device)
            return {"encoder_hidden_states": given, "pooled_projections": pooled}, {}

        return text_conditions(request, companions, self.default_guidance(config), encode, self.embedder(config))

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward: packed latents, and positions of text (all zero) and image squares."""
        n, channels, height, width = x.shape
        rows, columns = height // PATCH, width // PATCH
        packed = x.view(n, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        ids = torch.zeros(rows, columns, 3)
        ids[..., 1] = torch.arange(rows)[:, None]
        ids[..., 2] = torch.arange(columns)
        return {
            "hidden_states": packed.reshape(n, rows * columns, channels * PATCH**2),
            "timestep": timestep_vector(timestep, x),
            "img_ids": ids.flatten(0, 1),
            "txt_ids": torch.zeros(conditions["encoder_hidden_states"].shape[1], 3),
            **conditions,
        }

    def predict(self, model: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the unpacked prediction, `[N, C, H, W]`."""
        packed = super().predict(model, x, timestep, conditions)
        n, _, height, width = x.shape
        squares = packed.view(n, height // PATCH, width // PATCH, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return squares.reshape(n, -1, height, width)

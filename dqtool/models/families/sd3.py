"""`SD3Transformer2DModel`: Stable Diffusion 3 and 3.5, text and image in two streams with joint attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.models.conditions.conditioning import CONTEXT_TOKENS, Conditions, Request, text_conditions
from dqtool.models.families.base import Family, register, square_sample, timestep_vector

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["SD3"]


@register
class SD3(Family):
    """Flow-matching transformers on text tokens and pooled text."""

    name = "sd3"
    class_name = "SD3Transformer2DModel"
    block_classes = ("JointTransformerBlock",)
    sample = "hidden_states"
    traced_size = True
    guidance = 7.0
    scheduler: ClassVar[ForeignConfig | None] = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}

    def sample_shape(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return `(C, H, W)` from `in_channels` and `sample_size`."""
        return square_sample({"sample_size": 128, "in_channels": 16, **config})

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random text `[N, S, D]` (77 tokens of CLIP and 256 of T5) and pooled text."""
        tokens, width = config.get(CONTEXT_TOKENS, 333), config.get("joint_attention_dim", 4096)
        return {
            "encoder_hidden_states": torch.randn(batch, tokens, width, generator=generator),
            "pooled_projections": torch.randn(batch, config.get("pooled_projection_dim", 2048), generator=generator),
        }

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return prompts encoded by the pipeline's text models; T5 is optional."""
        if companions is None or not companions.encodes_text:
            return super().make_conditions(config, request, companions)

        def encode(pipeline: Any, prompts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            # Without T5 the pipeline reads the width of the text from the transformer's config.
            pipeline.transformer = _Widths(config)
            given, without, pooled, no_pooled = pipeline.encode_prompt(prompts, None, None, device=pipeline.device)
            return (
                {"encoder_hidden_states": given, "pooled_projections": pooled},
                {"encoder_hidden_states": without[:1], "pooled_projections": no_pooled[:1]},
            )

        return text_conditions(request, companions, self.guidance, encode)

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward, with the timestep as `[N]`."""
        return {"hidden_states": x, "timestep": timestep_vector(timestep, x), **conditions}


class _Widths:
    """Substitute for the network in a pipeline that only reads its config."""

    dtype = torch.float32

    def __init__(self, config: ForeignConfig) -> None:
        from diffusers.configuration_utils import FrozenDict

        self.config = FrozenDict({"joint_attention_dim": 4096, **config})

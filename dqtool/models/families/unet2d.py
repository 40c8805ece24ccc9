"""`UNet2DModel`: DDPM CIFAR-10, digits-ddpm; LDM-4 bedroom and LDM-8 church on latents."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import UsageError
from dqtool.models.conditions.conditioning import Conditions, Request, class_labels
from dqtool.models.families.base import Family, register, small_sample

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["UNet2D"]


@register
class UNet2D(Family):
    """UNets without text, on pixels or latents; class labels where the config has them."""

    name = "unet2d"
    class_name = "UNet2DModel"
    block_classes = ("ResnetBlock2D", "Attention")

    def proof_config(self, config: ForeignConfig) -> ForeignConfig:
        """Return the config with small samples."""
        return small_sample(config)

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random class labels for class-conditional networks."""
        classes = config.get("num_class_embeds")
        return {"class_labels": torch.randint(0, classes, (batch,), generator=generator)} if classes else {}

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return all classes in turn, without guidance, since the network has no label for "no class".

        Raises:
            UsageError: the request has prompts or guidance.
        """
        if not config.get("num_class_embeds"):
            return super().make_conditions(config, request, companions)
        if request.guidance is not None and request.guidance > 1:
            raise UsageError(
                "Guidance needs a label that stands for no class, and this network has none",
                where="--guidance",
                fix="Leave it out",
            )
        return class_labels(replace(request, card={}), int(config["num_class_embeds"]), 1.0)

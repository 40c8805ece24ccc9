"""`DiTTransformer2DModel`: DiT-XL/2 and digits-dit, conditioned on a class through adaptive norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.models.conditions.conditioning import Conditions, Request, class_labels
from dqtool.models.families.base import Family, register, timestep_vector

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions

__all__ = ["DiT"]


@register
class DiT(Family):
    """Class-conditional transformers. The label `num_embeds_ada_norm` stands for no class."""

    name = "dit"
    class_name = "DiTTransformer2DModel"
    block_classes = ("BasicTransformerBlock",)
    sample = "hidden_states"
    traced_size = True
    guidance = 4.0

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random class labels."""
        return {"class_labels": torch.randint(0, _classes(config), (batch,), generator=generator)}

    def make_conditions(self, config: ForeignConfig, request: Request, companions: Companions | None) -> Conditions:
        """Return all classes in turn."""
        return class_labels(request, _classes(config), self.guidance)

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward, with the timestep as `[N]`."""
        return {"hidden_states": x, "timestep": timestep_vector(timestep, x), **conditions}

    def tied_modules(self, config: ForeignConfig) -> Sequence[tuple[str, str]]:
        """Return the embedders of time and class: DiT has one, diffusers' class builds one in each block."""
        first = "transformer_blocks.0.norm1.emb"
        return [(f"transformer_blocks.{i}.norm1.emb", first) for i in range(1, int(config.get("num_layers", 28)))]


def _classes(config: ForeignConfig) -> int:
    return int(config.get("num_embeds_ada_norm") or 1000)

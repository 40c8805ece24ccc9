"""Families of diffusion networks: one adapter each. The rest of dqtool knows no family.

An adapter says which class it serves, which of its modules are trained as one block, what a minimal input looks like
and how the network is called. `register` adds one; `family_of` finds it by the config's class name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dqtool.errors import ArtifactError

__all__ = ["FAMILIES", "Family", "family_of", "register"]


class Family(ABC):
    """What dqtool must know of a network class.

    A denoising input is a dict of tensors whose first dimension is the sample: `x` `[N, C, H, W]` and, where the
    network is conditioned, one entry per condition.
    """

    name: ClassVar[str]
    class_name: ClassVar[str]
    block_classes: ClassVar[tuple[str, ...]]

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """The network with random weights, from a diffusers config.

        Raises:
            ArtifactError: diffusers refuses the config.
        """
        import diffusers

        try:
            return getattr(diffusers, self.class_name).from_config(dict(config))
        except (TypeError, ValueError, KeyError) as e:
            raise ArtifactError(f"The config does not describe a {self.class_name}: {e}", where="model config") from e

    @abstractmethod
    def sample_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of one sample, `(C, H, W)`."""

    def conditions(self, config: Mapping[str, Any], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Conditioning tensors for `batch` samples drawn at random, for networks that need some."""
        return {}

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the network's forward. `timestep` is a scalar or `[N]`."""
        return {"sample": x, "timestep": timestep, **conditions}

    def predict(self, model: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """The network's prediction, shaped like `x`."""
        return model(**self.arguments(x, timestep, conditions), return_dict=False)[0]

    def example(self, config: Mapping[str, Any], batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Arguments for one forward on random input, to trace and to compare networks with."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, *self.sample_shape(config), generator=generator)
        timestep = torch.randint(0, 1000, (batch,), generator=generator)
        return self.arguments(x, timestep, self.conditions(config, batch, generator))


FAMILIES: dict[str, Family] = {}
"""Adapters by the diffusers class they serve."""


def register(cls: type[Family]) -> type[Family]:
    """Class decorator: make an adapter known."""
    FAMILIES[cls.class_name] = cls()
    return cls


def family_of(class_name: str, where: str) -> Family:
    """The adapter for a diffusers class.

    Raises:
        ArtifactError: no adapter serves it.
    """
    if class_name not in FAMILIES:
        raise ArtifactError(
            f"dqtool has no adapter for networks of class '{class_name}'.",
            where=where,
            fix=f"Supported classes: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[class_name]


@register
class UNet2D(Family):
    """Pixel-space UNets without text: DDPM CIFAR-10, digits-ddpm; class labels where the config has them."""

    name = "unet2d"
    class_name = "UNet2DModel"
    block_classes = ("ResnetBlock2D", "Attention")

    def sample_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """From `in_channels` and `sample_size`."""
        size = config.get("sample_size")
        if size is None:
            raise ArtifactError(
                "The config does not say how large the network's samples are",
                where="model config, key sample_size",
                fix="Set sample_size, for example 32, in the config.json",
            )
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), height, width

    def conditions(self, config: Mapping[str, Any], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random class labels for class-conditional networks."""
        classes = config.get("num_class_embeds")
        return {"class_labels": torch.randint(0, classes, (batch,), generator=generator)} if classes else {}

"""Quantized layers that accept a float low-rank branch (LoRA): `y + B(Ax)` with `y` the quantized product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Adaptable", "float_twin"]


class Adaptable:
    """Base class of quantized layers that replace an `nn.Linear` or an `nn.Conv2d`."""

    weight_scale: Tensor

    @property
    def qweight(self) -> Tensor:
        """Return a float tensor on the layer's device; peft gives a branch its device and dtype."""
        return self.weight_scale

    def geometry_of_float(self) -> dict[str, object]:
        """Return the constructor arguments of the float layer: those of `nn.Linear` or of `nn.Conv2d`."""
        raise NotImplementedError


def float_twin(layer: Adaptable) -> nn.Module:
    """Return a float layer of the same geometry whose weight is allocated but not initialised."""
    arguments = layer.geometry_of_float()
    kind = nn.Conv2d if "kernel_size" in arguments else nn.Linear
    twin: nn.Module = torch.nn.utils.skip_init(kind, **arguments, device=layer.qweight.device)
    return twin

"""Quantized layers to which a float low-rank branch can be added: `y + B(Ax)` beside the quantized product."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Adaptable", "float_twin"]


class Adaptable:
    """Base of quantized layers that stand for an `nn.Linear` or an `nn.Conv2d`."""

    weight_scale: Tensor

    @property
    def qweight(self) -> Tensor:
        """A float tensor on the layer's device: peft reads the device and dtype of a branch from it."""
        return self.weight_scale

    def geometry_of_float(self) -> dict[str, object]:
        """The arguments of `nn.Linear` (`in_features`, `out_features`) or of `nn.Conv2d`."""
        raise NotImplementedError


def float_twin(layer: Adaptable) -> nn.Module:
    """Return the float layer of the same geometry, its weight allocated and not set."""
    arguments = layer.geometry_of_float()
    kind = nn.Conv2d if "kernel_size" in arguments else nn.Linear
    twin: nn.Module = torch.nn.utils.skip_init(kind, **arguments, device=layer.qweight.device)
    return twin

"""Low-rank updates of frozen weights that are added *before* quantization (QALoRA of EfficientDM, arXiv 2310.03270)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dqtool.core.affine import fake_quantize
from dqtool.nn.layers import FakeQuantLayer, WeightAdapter

__all__ = ["LowRank", "attach_low_rank"]


class LowRank(WeightAdapter):
    """Low-rank update: the weight is `W + up · down`, with `down` `[r, C_in/groups · taps]` and `up` `[C_out, r]`, zero
    at first."""

    def __init__(self, layer: FakeQuantLayer, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = layer.weight.shape[0], layer.weight[0].numel()
        rank = min(rank, rows, columns)
        bound = 1 / math.sqrt(columns)  # Kaiming's uniform bound with a = sqrt(5), as in the LoRA paper's code
        drawn = (torch.rand(rank, columns, generator=generator) * 2 - 1) * bound
        self.down = nn.Parameter(drawn.to(layer.weight.device))
        self.up = nn.Parameter(layer.weight.new_zeros(rows, rank))

    def weight(self, layer: FakeQuantLayer) -> Tensor:
        """Return the float weight including its update."""
        return layer.weight + (self.up @ self.down).view(layer.weight.shape)

    def quantized_weight(self, layer: FakeQuantLayer) -> Tensor:
        """Return the quantized sum of weight and update."""
        weight = self.weight(layer)
        if layer.weight_scale is None or layer.weight_zero_point is None:
            return weight
        shape = (-1, *(1,) * (weight.dim() - 1))
        scale, zero_point = layer.weight_scale.view(shape), layer.weight_zero_point.view(shape)
        return fake_quantize(weight, scale, zero_point, layer.bits.weight, layer.low)

    def merge(self, layer: FakeQuantLayer) -> None:
        """Add the update to the weight and remove it."""
        with torch.no_grad():
            layer.weight.copy_(self.weight(layer))
        layer.adapter = None


def attach_low_rank(module: nn.Module, rank: int, seed: int) -> list[tuple[FakeQuantLayer, LowRank]]:
    """Attach an update of this rank to every quantized layer of `module`; return each layer with its update.

    The rank is limited by the smaller side of the weight.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for layer in list(module.modules()):
        if isinstance(layer, FakeQuantLayer):
            adapter = LowRank(layer, rank, generator)
            layer.adapter = adapter
            found.append((layer, adapter))
    return found

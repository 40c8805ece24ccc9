"""Learnable equivalent transformation (OmniQuant, arXiv 2308.13137): scale and shift of a layer's input as parameters.

While it trains, a layer reads `(x − d)·e^−r`, multiplies with `W·e^r` and adds `W d`: in float, whatever r and d are,
what it did before. `bake` makes them part of the network: r of the dilation, d of biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dqtool.core.dilation import spread
from dqtool.nn.layers import FakeQuantLayer, InputTransform
from dqtool.scaling.folding import Fold, shift

__all__ = ["LearnedScaling", "attach", "bake"]


class LearnedScaling(InputTransform):
    """`log_scale` and, where the input can be moved, `shift`, both `[C_in]` and zero at first, learned at `rate`. Layers
    that share an input share it."""

    shift: nn.Parameter | None

    def __init__(self, channels: int, shifts: bool, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_parameter("shift", nn.Parameter(torch.zeros(channels)) if shifts else None)

    def move(self, x: Tensor, is_conv: bool) -> Tensor:
        """The moved input, `[N, C, H, W]` or `[N, ..., C]`."""
        return x if self.shift is None else x - self.shift.view((-1, 1, 1) if is_conv else (-1,))

    def widen(self, dilation: Tensor | None) -> Tensor:
        """What the input is divided by, `[C]`, where it was `dilation` before."""
        factor = self.log_scale.exp()
        return factor if dilation is None else dilation * factor

    def multiply(self, weight: Tensor, groups: int) -> Tensor:
        """The weight that this input belongs to."""
        return weight * spread(self.log_scale.exp(), weight, groups)

    def restore(self, bias: Tensor, weight: Tensor, dilation: Tensor | None, groups: int) -> Tensor:
        """The bias with what the shift took, `b + W d`; `weight` is `dilation · W`."""
        if self.shift is None:
            return bias
        by = self.shift if dilation is None else self.shift / dilation
        return bias + (weight * spread(by, weight, groups)).flatten(1).sum(1)


def attach(network: nn.Module, groups: Iterable[tuple[Sequence[str], float]], shifts: Mapping[str, Fold]) -> None:
    """Make scale and shift of these groups of layers learnable, each at a rate of its own; the first of a group is its
    owner. `shifts`: who can take an owner's shift."""
    for names, rate in groups:
        layers = [network.get_submodule(name) for name in names]
        learned: LearnedScaling | None = None
        for layer in layers:
            assert isinstance(layer, FakeQuantLayer)
            assert layer.dilation is not None
            if learned is None:
                learned = LearnedScaling(layer.dilation.numel(), names[0] in shifts, rate).to(layer.weight.device)
            layer.learned = learned


@torch.no_grad()
def bake(network: nn.Module, shifts: Mapping[str, Fold]) -> None:
    """End of learning: weights, dilations and biases take what was learned, in place."""
    moved: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, FakeQuantLayer) and layer.learned is not None:
            learned = layer.learned
            assert isinstance(learned, LearnedScaling)
            if learned.shift is not None:
                assert layer.bias is not None
                layer.bias.copy_(learned.restore(layer.bias, layer.weight, layer.dilation, layer.groups))
                if name in shifts:
                    moved[name] = learned.shift.detach()
            layer.weight.copy_(learned.multiply(layer.weight, layer.groups))
            assert layer.dilation is not None
            layer.dilation = layer.dilation * learned.log_scale.exp()
            layer.learned = None
    for name, by in moved.items():
        targets = {f"{t.name}.bias" if t.rows else t.name for t in shifts[name].targets}
        tensors = {target: network.get_parameter(target).detach() for target in targets}
        shift(tensors, shifts[name], by)
        for target, value in tensors.items():
            network.get_parameter(target).copy_(value)

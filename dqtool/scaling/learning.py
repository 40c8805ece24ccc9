"""Learnable equivalent transformation (OmniQuant, arXiv 2308.13137): scale and shift of a layer's input as parameters.

While it trains, a layer reads `(x − d)·e^−r`, multiplies with `W·e^r` and adds `W d`: in float this computes what the
layer computed before, whatever r and d are. `merge_learned` makes them part of the network: r of the dilation, d of
biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dqtool.artifacts import Manifest
from dqtool.core.dilation import broadcast_scale
from dqtool.models.networks.packed import layer_infos
from dqtool.models.networks.recorded_graph import graph_of
from dqtool.nn.layers import FakeQuantLayer, InputTransform
from dqtool.scaling.folding import Fold, find_shifts, subtract_shift
from dqtool.scaling.groups import scaling_groups
from dqtool.scaling.methods import METHODS
from dqtool.scaling.records import scaling_of

__all__ = ["LearnedScaling", "attach", "learn_scaling", "merge_learned"]


class LearnedScaling(InputTransform):
    """Learned `log_scale` and, where the input can be shifted, `shift`, both `[C_in]` and zero at first.

    `rate` is their learning rate. Layers that share an input share it.
    """

    shift: nn.Parameter | None

    def __init__(self, channels: int, shifts: bool, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_parameter("shift", nn.Parameter(torch.zeros(channels)) if shifts else None)

    def move(self, x: Tensor, is_conv: bool) -> Tensor:
        """Return the shifted input."""
        return x if self.shift is None else x - self.shift.view((-1, 1, 1) if is_conv else (-1,))

    def widen(self, dilation: Tensor | None) -> Tensor:
        """Return `dilation · e^r`, `[C]`."""
        factor = self.log_scale.exp()
        return factor if dilation is None else dilation * factor

    def multiply(self, weight: Tensor, groups: int) -> Tensor:
        """Return `W · e^r`."""
        return weight * broadcast_scale(self.log_scale.exp(), weight, groups)

    def restore(self, bias: Tensor, weight: Tensor, dilation: Tensor | None, groups: int) -> Tensor:
        """Return `b + W d`; `weight` is `dilation · W`."""
        if self.shift is None:
            return bias
        by = self.shift if dilation is None else self.shift / dilation
        return bias + (weight * broadcast_scale(by, weight, groups)).flatten(1).sum(1)


def learn_scaling(manifest: Manifest, student: nn.Module) -> dict[str, Fold]:
    """Make the factors of methods that learn them (auto, omniquant) parameters of the student's layers.

    `merge_learned` ends the learning. Folded factors stay as they are. Returns the producers that can absorb the shift of
    each group whose shift is learned too, by the group's owner.
    """
    rates: dict[str, float] = {}
    shifted: set[str] = set()
    groups = scaling_groups(layer_infos(manifest.layers))
    for owner, members in groups.items():
        if members[0].rotation:
            continue
        scaling = scaling_of(manifest, owner)
        method = METHODS.get(scaling.asked or scaling.method or "")
        if method is not None and method.learning_rate and scaling.folded_into is None:
            rates[owner] = method.learning_rate
            if method.learns_shift and scaling.shifted_in is not None:
                shifted.add(owner)
    shifts: dict[str, Fold] = {}
    if shifted:
        found = find_shifts(graph_of(manifest).recording, layer_infos(manifest.layers))
        shifts = {owner: fold for owner, fold in found.items() if owner in shifted}
    shared = [
        ([owner, *(m.name for m in groups[owner] if m.name != owner)], learning_rate)
        for owner, learning_rate in rates.items()
    ]
    attach(student, shared, shifts)
    return shifts


def attach(network: nn.Module, groups: Iterable[tuple[Sequence[str], float]], shifts: Mapping[str, Fold]) -> None:
    """Make scale and shift of these groups of layers learnable, each at its own rate.

    The first layer of a group is its owner; `shifts` holds the producers that can absorb an owner's shift.
    """
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
def merge_learned(network: nn.Module, shifts: Mapping[str, Fold]) -> None:
    """End the learning: write what was learned into weights, dilations and biases, in place."""
    moved: dict[str, Tensor] = {}
    for name, layer in network.named_modules():
        if isinstance(layer, FakeQuantLayer) and isinstance(layer.learned, LearnedScaling):
            learned = layer.learned
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
        subtract_shift(tensors, shifts[name], by)
        for target, value in tensors.items():
            network.get_parameter(target).copy_(value)

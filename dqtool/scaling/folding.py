"""Moving `1/s` out of a layer's quantizer into whatever makes its input, where the algebra allows.

A scaled layer reads `x / s`. If all that makes `x` is linear in some affine, and nobody else reads it, the affine can
make `x / s` itself: the affine of a norm, the value half of a GEGLU's projection, the shift and scale rows of adaLN
(bias `b → (1 + b)/s − 1`), `v` for the projection after attention. Nothing here knows those by name: the division is
pulled backwards through the recorded operations (`dataflow`) until it ends in parameters, or meets an operation it
can't pass (SiLU, GELU, softmax) or a tensor with other readers. Then it stays in the quantizer.

`dilate --fold` folds everything, in float, before calibration. Otherwise `distill` folds what crosses no quantizer, in
the packed tensors that it ends with: what is exported is then bit for bit what was distilled.

A shift `x − z` (Outlier Suppression+) is moved the same way; it ends in biases.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.graph.dataflow import dataflow
from dqtool.graph.trace import LayerInfo
from dqtool.scaling.propagation import FREE, Pull, PullShift, Refused, Target

__all__ = ["Fold", "Target", "find_folds", "find_shifts", "fold", "fold_all", "shift"]


@dataclass(frozen=True)
class Fold:
    """The factors of `layers` (one input, one `s`) can move into `targets`.

    `crosses`: an attention product lies between, whose quantized operand changes: only right before calibration.
    """

    layers: tuple[str, ...]
    targets: tuple[Target, ...]
    crosses: bool = False

    @property
    def names(self) -> list[str]:
        """The targets' names."""
        return [target.name for target in self.targets]


def find_folds(network: nn.Module, inputs: Mapping[str, Any], layers: Sequence[LayerInfo]) -> list[Fold]:
    """Every fold that `network` allows, in execution order; only its structure matters (it may be on `meta`).

    `inputs` are arguments of its forward; `layers` say which of them share a factor.
    """
    return _find(network, inputs, layers, Pull)


def find_shifts(network: nn.Module, inputs: Mapping[str, Any], layers: Sequence[LayerInfo]) -> list[Fold]:
    """As `find_folds`, for a vector that is subtracted from the layers' input: the targets' biases take it."""
    return _find(network, inputs, layers, PullShift)


def _find(network: nn.Module, inputs: Mapping[str, Any], layers: Sequence[LayerInfo], pull: type[Pull]) -> list[Fold]:
    flow = dataflow(network, inputs)
    groups: dict[str, list[str]] = {}
    for info in layers:
        if info.kind != "attention":
            groups.setdefault(info.shares or info.name, []).append(info.name)
    folds = []
    for members in groups.values():
        try:
            targets, crosses = pull(flow, members).run()
        except Refused:
            continue
        folds.append(Fold(tuple(members), targets, crosses))
    return folds


def shift(tensors: MutableMapping[str, Tensor], found: Fold, by: Tensor) -> None:
    """Subtract `by` `[C_in]` from what the targets of `find_shifts` make, in place of their entries in `tensors`."""
    for target in found.targets:
        name = f"{target.name}.bias" if target.rows else target.name
        channels = target.channels.to(by.device)
        moved = torch.where(channels == FREE, 0.0, by[channels.clamp(min=0)])
        tensors[name] = tensors[name] - moved.to(tensors[name].dtype)


def fold(tensors: MutableMapping[str, Tensor], found: Fold, scale: Tensor) -> None:
    """Divide the targets by `scale` `[C_in]`, in place of their entries in `tensors`.

    Works on float networks and on packed ones, where the rows' `weight_scale` shrinks and the codes stay as they are.
    """
    for target in found.targets:
        channels = target.channels.to(scale.device)
        factor = torch.where(channels == FREE, 1.0, scale[channels.clamp(min=0)])

        offset = target.offset.to(scale.device)

        def divided(value: Tensor, factor: Tensor = factor, offset: Tensor = offset) -> Tensor:
            # In double: (1 + b)/s - 1 cancels.
            return ((value.double() + offset) / factor.double() - offset).to(value.dtype)

        if not target.rows:
            tensors[target.name] = divided(tensors[target.name])
            continue
        weight = f"{target.name}.weight_scale"
        if weight not in tensors:
            weight = f"{target.name}.weight"
        if weight in tensors:
            value = tensors[weight]
            tensors[weight] = value / factor.view(-1, *(1,) * (value.dim() - 1)).to(value.dtype)
        if f"{target.name}.bias" in tensors:
            tensors[f"{target.name}.bias"] = divided(tensors[f"{target.name}.bias"])


def fold_all(tensors: MutableMapping[str, Tensor], folds: Iterable[Fold], crossing: bool) -> dict[str, list[str]]:
    """Apply every fold to the `X.dilation` in `tensors`, which go; returns the targets' names by layer.

    `crossing` allows those through an attention product.
    """
    done = {}
    for found in folds:
        names = [f"{layer}.dilation" for layer in found.layers]
        if names[0] in tensors and (crossing or not found.crosses):
            fold(tensors, found, tensors[names[0]])
            for layer, name in zip(found.layers, names, strict=True):
                del tensors[name]
                done[layer] = found.names
    return done

"""Folding: move `1/s` out of a layer's quantizer into the producer of its input, where the algebra allows.

A scaled layer reads `x / s`. If everything that produces `x` is linear in some affine, and nothing else reads it, the
affine can produce `x / s` itself: the affine of a norm, the value half of a GEGLU's projection, the shift and scale
rows of adaLN (bias `b → (1 + b)/s − 1`), `v` for the projection after attention. No case is known by name: `propagation`
moves the division backwards through the recorded operations until it ends in parameters. An operation that it can't
pass (SiLU, GELU, softmax) or a tensor with other readers stops it, and the division stays in the quantizer.

`dilate --fold` folds everything, in float, before calibration. Otherwise `distill` folds whatever crosses no quantizer,
in the packed tensors after training, so that the exported network is bit for bit the distilled one.

A shift `x − z` (Outlier Suppression+) moves the same way; it ends in biases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, MutableMapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqtool.artifacts import Manifest
from dqtool.core.dilation import broadcast_scale
from dqtool.graph.leaves import zero_padding
from dqtool.graph.recording import Recording
from dqtool.graph.trace import LayerInfo
from dqtool.models.networks.packed import layer_infos
from dqtool.models.networks.recorded_graph import graph_of
from dqtool.nn.branch import BRANCH
from dqtool.scaling.groups import scaling_groups
from dqtool.scaling.propagation import UNSCALED, NotFoldable, Propagation, ShiftPropagation, Target
from dqtool.scaling.records import dilated_layers

__all__ = [
    "Fold",
    "Target",
    "add_shift_to_bias",
    "find_folds",
    "find_shifts",
    "fold_packed",
    "fold_scale",
    "fold_scales",
    "pending_folds",
    "subtract_shift",
]


@dataclass(frozen=True)
class Fold:
    """The factors of `layers` (one input, one `s`) can move into `targets`.

    `crosses`: an attention product lies between, whose quantized operand changes; allowed only before calibration.
    """

    layers: tuple[str, ...]
    targets: tuple[Target, ...]
    crosses: bool = False

    @property
    def names(self) -> list[str]:
        """Names of the targets."""
        return [target.name for target in self.targets]


def find_folds(recording: Recording, layers: Sequence[LayerInfo]) -> list[Fold]:
    """Return every fold that a recorded network allows, in execution order; `layers` say which of them share a factor."""
    return list(_find(recording, layers, Propagation).values())


def find_shifts(recording: Recording, layers: Sequence[LayerInfo]) -> dict[str, Fold]:
    """Return, by group owner, the producers whose biases can absorb a shift of the group's input.

    The layers' own biases must be able to take the shift back. A convolution that pads would see the shift at its
    borders, so it is not shifted.
    """
    groups = scaling_groups(layers)
    return {
        owner: found
        for owner, found in _find(recording, layers, ShiftPropagation).items()
        if all(info.bias and not _pads(recording.network.get_submodule(info.name)) for info in groups[owner])
    }


def _find(recording: Recording, layers: Sequence[LayerInfo], kind: type[Propagation]) -> dict[str, Fold]:
    folds = {}
    for owner, members in scaling_groups(layers).items():
        names = [info.name for info in members]
        try:
            targets, crosses = kind(recording, names).run()
        except NotFoldable:
            continue
        folds[owner] = Fold(tuple(names), targets, crosses)
    return folds


def _pads(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and zero_padding(layer) != (0, 0)


def pending_folds(manifest: Manifest, branched: Collection[str] = ()) -> list[Fold]:
    """Return the folds that `distill` will make: of factors still in a quantizer, those that cross no other quantizer.

    Layers `branched` have low-rank branches, whose float16 factors a fold would round: it leaves them alone.
    """
    dilated = dilated_layers(manifest)
    if not dilated:
        return []
    folds = find_folds(graph_of(manifest).recording, layer_infos(manifest.layers))
    return [
        found
        for found in folds
        if not found.crosses
        and dilated.issuperset(found.layers)
        and not {*found.layers, *found.names}.intersection(branched)
    ]


def fold_packed(manifest: Manifest, state: dict[str, Tensor]) -> dict[str, list[str]]:
    """Fold the dilation of a trained, packed network, in place; returns the producers' names by layer.

    This happens after training, because the learning rates of a folded producer's rows would no longer fit them, and in
    the packed tensors, whose codes stay as they are: only `weight_scale`, biases and norms change.
    """
    end = f".{BRANCH}.up"
    branched = {name.removesuffix(end) for name in state if name.endswith(end)}
    return fold_scales(state, pending_folds(manifest, branched), crossing=False)


def fold_scales(tensors: MutableMapping[str, Tensor], folds: Iterable[Fold], crossing: bool) -> dict[str, list[str]]:
    """Fold every `X.dilation` in `tensors` that can be, in place, and remove it; returns the targets' names by layer.

    `crossing` allows folds through an attention product.
    """
    done = {}
    for found in folds:
        names = [f"{layer}.dilation" for layer in found.layers]
        if names[0] in tensors and (crossing or not found.crosses):
            fold_scale(tensors, found, tensors[names[0]])
            for layer, name in zip(found.layers, names, strict=True):
                del tensors[name]
                done[layer] = found.names
    return done


def fold_scale(tensors: MutableMapping[str, Tensor], found: Fold, scale: Tensor) -> None:
    """Divide the targets by `scale` `[C_in]`, in place of their entries in `tensors`.

    Works on float networks and on packed ones, where the rows' `weight_scale` shrinks and the codes stay as they are.
    """
    for target in found.targets:
        channels = target.channels.to(scale.device)
        factor = torch.where(channels == UNSCALED, 1.0, scale[channels.clamp(min=0)])

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


def subtract_shift(tensors: MutableMapping[str, Tensor], found: Fold, by: Tensor) -> None:
    """Subtract `by` `[C_in]` from the output of the targets of `find_shifts`, in place of their entries in `tensors`."""
    for target in found.targets:
        name = f"{target.name}.bias" if target.rows else target.name
        channels = target.channels.to(by.device)
        moved = torch.where(channels == UNSCALED, 0.0, by[channels.clamp(min=0)])
        tensors[name] = tensors[name] - moved.to(tensors[name].dtype)


def add_shift_to_bias(tensors: MutableMapping[str, Tensor], info: LayerInfo, weight: Tensor, by: Tensor) -> None:
    """Set the layer's bias to `b + W z`, in place, where its input is shifted by `-z`; `weight` is the original one."""
    moved = (weight.double() * broadcast_scale(by, weight, info.groups).double()).flatten(1).sum(1)
    bias = tensors[f"{info.name}.bias"]
    tensors[f"{info.name}.bias"] = (bias.double() + moved).to(bias.dtype)

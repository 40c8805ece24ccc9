"""Where the scales of an artifact's layers go after `dilate`: learned on in training, then into what makes the inputs."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.artifacts import Manifest
from dqtool.core.dilation import spread
from dqtool.graph.repeats import tie_repeats
from dqtool.graph.trace import LayerInfo
from dqtool.models.loading import network_of
from dqtool.models.packed import layer_infos
from dqtool.scaling.choosing import Groups, groups_of, shiftable
from dqtool.scaling.folding import Fold, find_folds, find_shifts, fold_all
from dqtool.scaling.learning import attach
from dqtool.scaling.methods import SCALINGS
from dqtool.scaling.records import figures

__all__ = [
    "absorb_shift",
    "dilated_layers",
    "fold_packed",
    "learn_scaling",
    "mark_folded",
    "mark_learned",
    "pending_folds",
    "structure_of",
]


def absorb_shift(tensors: MutableMapping[str, Tensor], info: LayerInfo, weight: Tensor, by: Tensor) -> None:
    """`b + W z`, in place: what the layer adds for its input being moved by `-z`. `weight` is the original one."""
    moved = (weight.double() * spread(by, weight, info.groups).double()).flatten(1).sum(1)
    bias = tensors[f"{info.name}.bias"]
    tensors[f"{info.name}.bias"] = (bias.double() + moved).to(bias.dtype)


def pending_folds(manifest: Manifest) -> list[Fold]:
    """The folds that `distill` makes: of the factors still in a quantizer, those that cross none on their way."""
    dilated = dilated_layers(manifest)
    if not dilated:
        return []
    folds = find_folds(*structure_of(manifest))
    return [found for found in folds if not found.crosses and dilated.issuperset(found.layers)]


def dilated_layers(manifest: Manifest) -> set[str]:
    """Names of the layers that divide their input, of a dilated or calibrated artifact."""
    return {layer["name"] for layer in manifest.layers if "scaling" in layer and "folded_into" not in layer["scaling"]}


def fold_packed(manifest: Manifest, state: dict[str, Tensor]) -> dict[str, list[str]]:
    """Move the dilation of a trained, packed network into producers where no quantizer lies between, in place.

    After training, because a producer's rows would train at rates that no longer fit them; in the packed tensors, where
    codes stay as they are and only `weight_scale`, biases and norms change. Returns the producers by layer.
    """
    return fold_all(state, pending_folds(manifest), crossing=False)


def mark_learned(records: Sequence[dict[str, Any]], before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Note in a manifest's layers whose factors training moved, and what they are now; `X.dilation` before and after."""
    for record in records:
        name = f"{record['name']}.dilation"
        if name in before and name in after and not torch.equal(before[name], after[name]):
            record["scaling"] = record["scaling"] | figures(after[name]) | {"learned": True}


def mark_folded(records: Sequence[dict[str, Any]], folded: Mapping[str, list[str]]) -> None:
    """Note in a manifest's layers where their factors went."""
    for record in records:
        if record["name"] in folded:
            record["scaling"] = record["scaling"] | {"folded_into": folded[record["name"]]}


def learn_scaling(manifest: Manifest, student: nn.Module) -> dict[str, Fold]:
    """Make the scales that a method wants learned (auto, omniquant) parameters of the student's layers; `bake` ends it.

    Returns what can take the shift of each group whose shift is learned too, by the group's owner. Folded scales stay as they
    are.
    """
    groups: Groups = {}
    rates: dict[str, float] = {}
    moving: set[str] = set()
    for owner, members in groups_of(layer_infos(manifest.layers)).items():
        scaling = _scaling(manifest, owner)
        method = SCALINGS.get(scaling.get("asked", scaling.get("method", "")))
        if method is not None and method.learning_rate and "folded_into" not in scaling:
            groups[owner], rates[owner] = members, method.learning_rate
            if method.learns_shift and "shifted_in" in scaling:
                moving.add(owner)
    shifts: dict[str, Fold] = {}
    if moving:
        network, example, infos = structure_of(manifest)
        found = shiftable(network, infos, find_shifts(network, example, infos))
        shifts = {owner: each for owner, each in found.items() if owner in moving}
    shared = [
        ([owner, *(m.name for m in members if m.name != owner)], rates[owner]) for owner, members in groups.items()
    ]
    attach(student, shared, shifts)
    return shifts


def _scaling(manifest: Manifest, name: str) -> dict[str, Any]:
    return next(layer.get("scaling", {}) for layer in manifest.layers if layer["name"] == name)


def structure_of(manifest: Manifest) -> tuple[nn.Module, dict[str, Any], list[LayerInfo]]:
    """The float network without its weights, arguments for it, and its layers."""
    family, config = network_of(manifest.model)
    with torch.device("meta"):
        names = [f"{layer['name']}.weight" for layer in manifest.layers]
        network = tie_repeats(family.build(config), names, family.repeats(config))
    return network, family.example(config), layer_infos(manifest.layers)

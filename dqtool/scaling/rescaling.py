"""Choice of new factors for a dilated network from its activations, the work of `dqtool calibrate --scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from dqtool.artifacts import Manifest
from dqtool.artifacts.records import LayerRecord, ScalingRecord
from dqtool.artifacts.schema import without
from dqtool.core.bits import LayerBits
from dqtool.core.device import to_cpu, to_device_of
from dqtool.core.dilation import CAP, broadcast_scale
from dqtool.core.rotation import rotate_weight
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.models.networks.recorded_graph import graph_of
from dqtool.scaling.choosing import Activations, choose_by_activations
from dqtool.scaling.folding import Fold, add_shift_to_bias, find_shifts, subtract_shift
from dqtool.scaling.groups import scaling_groups
from dqtool.scaling.methods import ScalingMethod, ScalingResult
from dqtool.scaling.records import (
    layer_scales,
    method_used,
    report_scaling,
    scaling_metrics,
    scaling_of,
    scaling_record,
)
from dqtool.scaling.verifying import check_equivalence

__all__ = ["Rescaled", "rescale_network", "undilated_weights"]


@dataclass(frozen=True)
class Rescaled:
    """A network whose factors were chosen again.

    Attributes:
        tensors: all tensors of the artifact, with the new weights, `X.dilation` and shifted biases.
        records: the layers as manifests have them.
        metrics: figures over all layers.
        shifts: shift of the inputs of shifted layers, `[C_in]`, by layer.
    """

    tensors: dict[str, Tensor]
    records: list[LayerRecord]
    metrics: dict[str, float]
    shifts: dict[str, Tensor]


def rescale_network(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    method: ScalingMethod,
    bits: LayerBits,
    activations: Activations,
) -> Rescaled:
    """Return a dilated artifact's tensors and records with the factors that `method` chooses by activations.

    Layers that keep their factors keep their tensors bit for bit. Folded factors are part of the network and stay.
    `network` is the float one, without factors; it is left as it is.

    Raises:
        NumericError: the output with the new factors differs from the original's by more than round-off.
    """
    layers = [info for info in layer_infos(manifest.layers) if scaling_of(manifest, info.name).folded_into is None]
    shifts: dict[str, Fold] = {}
    if method.shifts:
        shifts = find_shifts(graph_of(manifest).recording, layers)
    present = _present_factors(manifest, tensors)
    chosen = choose_by_activations(
        network,
        layers,
        method,
        activations,
        bits,
        shifts.keys(),
        present,
        CAP if manifest.parameters.cap is None else manifest.parameters.cap,
        1.0 if manifest.parameters.threshold is None else manifest.parameters.threshold,
    )
    scales = layer_scales(layers, {owner: result for owner, result in chosen.items() if not result.rotation})
    rotations: dict[str, int] = {}
    changed, moved = dict(tensors), {}
    records = {record.name: record for record in manifest.layers}
    for info in layers:
        name, owner = info.name, info.shares or info.name
        if info.kind == "attention":
            continue
        scaling: ScalingRecord | None = None
        rotation = records[name].rotation
        before, result = tensors.get(f"{name}.dilation"), chosen.get(owner)
        if result is None:
            if before is not None:
                changed[f"{name}.weight"] = _weight(network, name)
                del changed[f"{name}.dilation"]
        elif result is present.get(owner):
            scaling = records[name].scaling
        elif result.rotation:
            scaling, rotation = scaling_record(method, result), result.rotation
            rotations[name] = result.rotation
            changed[f"{name}.weight"] = rotate_weight(_weight(network, name), result.rotation)
            changed.pop(f"{name}.dilation", None)
        else:
            scaling = scaling_record(method, result)
            if before is None or not before.equal(scales[name]):
                used = method_used(method, result)
                changed[f"{name}.weight"] = used.apply(_weight(network, name), scales[name], info.groups)
                changed[f"{name}.dilation"] = scales[name]
            if result.shift is not None:
                add_shift_to_bias(changed, info, _weight(network, name), result.shift)
                moved[name] = result.shift
                scaling = replace(scaling, shifted_in=shifts[owner].names)
        records[name] = (
            without(records[name], "scaling")
            if scaling is None
            else replace(records[name], scaling=scaling, rotation=rotation)
        )
    for owner, result in chosen.items():
        if result.shift is not None:
            subtract_shift(changed, shifts[owner], result.shift)
    family, config = network_of(manifest.network)
    found = list(records.values())
    metrics = scaling_metrics(scales)
    error = check_equivalence(
        network, lambda: to_device_of(network, changed), scales, family, config, "calibrate", rotations
    )
    report_scaling(found, metrics, error)
    return Rescaled(changed, found, {**metrics, "equivalence_error": error}, moved)


def undilated_weights(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of dilated layers divided by their factors, and of rotated layers rotated back, by tensor name.

    They are the original ones to one ulp.
    """
    infos = layer_infos(manifest.layers)
    groups = {info.name: info.groups for info in infos}
    found = {
        f"{info.name}.weight": rotate_weight(tensors[f"{info.name}.weight"], info.rotation)
        for info in infos
        if info.rotation
    }
    for key, scale in tensors.items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "dilation":
            weight = tensors[f"{layer}.weight"]
            found[f"{layer}.weight"] = weight / broadcast_scale(scale, weight, groups[layer])
    return found


def _present_factors(manifest: Manifest, tensors: Mapping[str, Tensor]) -> dict[str, ScalingResult]:
    """Return the factors of each group in the artifact, by its owner, with the method that chose them."""
    return {
        owner: ScalingResult(tensors[f"{owner}.dilation"], method=scaling_of(manifest, owner).method)
        for owner in scaling_groups(layer_infos(manifest.layers))
        if f"{owner}.dilation" in tensors
    }


def _weight(network: nn.Module, name: str) -> Tensor:
    return to_cpu(network.get_parameter(f"{name}.weight").detach())

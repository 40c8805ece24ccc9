"""Factors of one calibrated network on another of the same architecture, the work of `dqtool calibrate --statistics`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from dqtool.artifacts import Manifest
from dqtool.core.device import to_cpu, to_device_of
from dqtool.core.rotation import rotate_weight
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.models.networks.recorded_graph import graph_of
from dqtool.scaling.folding import add_shift_to_bias, find_shifts, subtract_shift
from dqtool.scaling.methods import scale_weight
from dqtool.scaling.records import report_scaling, scaling_metrics
from dqtool.scaling.rescaling import Rescaled
from dqtool.scaling.verifying import check_equivalence

__all__ = ["reuse_factors"]

RANGE = ".channel_range"


def reuse_factors(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    calibrated: Manifest,
    found: Mapping[str, Tensor],
) -> Rescaled:
    """Return the tensors and records of a dilated artifact with the factors, rotations and shifts of a calibrated one.

    `network` is the float network of `manifest` and `tensors`, without factors. `found` holds the tensors of the artifact
    `calibrated`, whose layers are the same. A shift is the middle of the recorded range of its input.

    Raises:
        NumericError: the output with these factors differs from the original's by more than round-off.
    """
    infos = layer_infos(calibrated.layers)
    records = {record.name: record for record in calibrated.layers}
    shifted = {
        info.name: found[(info.shares or info.name) + RANGE].mean(0)
        for info in infos
        if (scaling := records[info.name].scaling) is not None and scaling.shifted_in
    }
    changed, rotations = dict(tensors), {}
    for info in infos:
        name, record = info.name, records[info.name]
        if info.kind == "attention":
            continue
        original = to_cpu(network.get_parameter(f"{name}.weight").detach())
        scale, before = found.get(f"{name}.dilation"), changed.pop(f"{name}.dilation", None)
        if record.rotation:
            changed[f"{name}.weight"], rotations[name] = rotate_weight(original, record.rotation), record.rotation
        elif scale is None:
            changed[f"{name}.weight"] = original if before is not None else tensors[f"{name}.weight"]
        else:
            # Without the clipping of Weight Dilation: factors of other weights may widen an out-channel.
            changed |= {f"{name}.weight": scale_weight(original, scale, info.groups), f"{name}.dilation": scale}
        if name in shifted:
            add_shift_to_bias(changed, info, original, shifted[name])
    if shifted:
        owners = {info.shares or info.name for info in infos if info.name in shifted}
        for owner, fold in find_shifts(graph_of(manifest).recording, infos).items():
            if owner in owners:
                subtract_shift(changed, fold, shifted[owner])
    scales = {name.removesuffix(".dilation"): value for name, value in changed.items() if name.endswith(".dilation")}
    family, config = network_of(manifest.network)
    error = check_equivalence(
        network, lambda: to_device_of(network, changed), scales, family, config, "calibrate", rotations
    )
    taken, metrics = list(calibrated.layers), scaling_metrics(scales)
    report_scaling(taken, metrics, error)
    return Rescaled(changed, taken, {**metrics, "equivalence_error": error}, shifted)

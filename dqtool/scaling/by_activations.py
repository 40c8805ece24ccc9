"""The scaling that `dilate` leaves to `calibrate`, which samples the model anyway and so sees what its layers read."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.artifacts import Manifest
    from dqtool.models.families import Family
    from dqtool.scaling.folding import Fold

__all__ = ["CHOSEN_IN_CALIBRATE", "LATER", "scale_now"]

CHOSEN_IN_CALIBRATE = frozenset({"auto"})
"""The methods for which `dilate` does so, where it is given no statistics."""

LATER = "scaling_in_calibrate"
"""The metric of a dilated artifact that says which method is waited for, and its options."""


def scale_now(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    family: Family,
    config: dict[str, Any],
    trajectory: Mapping[str, Tensor],
    steps: Iterable[Callable[[], None]],
) -> tuple[dict[str, Tensor], list[dict[str, Any]], dict[str, Any], dict[str, Tensor]]:
    """Choose the factors that a dilated artifact waits for; returns what changes: tensors (scaled weights, `X.dilation`, biases
    where inputs were moved), the layers' records, metrics; and by how much the inputs of which layers were moved, `[C_in]`.

    `network` is the float one and stays as it is; `trajectory` holds the points that searching methods look at, `steps`
    what `nn.statistics` wants.

    Raises:
        NumericError: the scaled network's output differs from the original's by more than round-off.
    """
    from dqtool.core.device import beside
    from dqtool.models.packed import layer_infos
    from dqtool.models.structure import graph_of
    from dqtool.nn.statistics import channel_ranges
    from dqtool.scaling.choosing import choose_scaling
    from dqtool.scaling.folding import add_shift_to_bias, find_shifts, subtract_shift
    from dqtool.scaling.methods import scaling_method
    from dqtool.scaling.records import layer_scales, method_used, report_scaling, scaling_metrics, scaling_record
    from dqtool.scaling.verifying import check_equivalence

    wanted = manifest.metrics[LATER]
    asked, layers = scaling_method(wanted["scaling"]), layer_infos(manifest.layers)
    statistics = {**trajectory, **channel_ranges(network, layers, steps)}
    shifts: dict[str, Fold] = {}
    if asked.shifts:
        shifts = find_shifts(graph_of(manifest).recording, layers)
    chosen = choose_scaling(
        network, family, layers, statistics, asked, wanted["cap"], wanted["bits"], shifts, wanted["threshold"]
    )
    scales = layer_scales(layers, chosen)
    changed: dict[str, Tensor] = {}
    moved: dict[str, Tensor] = {}
    everything = ChainMap(changed, dict(tensors))  # what is set goes to the first
    records = []
    for info, record in zip(layers, manifest.layers, strict=True):
        if info.name in scales:
            result, name = chosen[info.shares or info.name], f"{info.name}.weight"
            scaled = method_used(asked, result).apply(tensors[name], scales[info.name], info.groups)
            changed[name] = scaled.to(tensors[name].dtype)
            changed[f"{info.name}.dilation"] = scales[info.name]
            record = record | {"scaling": scaling_record(asked, result)}
            if result.shift is not None:
                add_shift_to_bias(everything, info, tensors[name], result.shift)
                moved[info.name] = result.shift
                record["scaling"]["shifted_in"] = shifts[info.shares or info.name].names
        records.append(record)
    for owner, result in chosen.items():
        if result.shift is not None:
            subtract_shift(everything, shifts[owner], result.shift)
    metrics = scaling_metrics(scales)
    error = check_equivalence(network, lambda: beside(network, dict(everything)), scales, family, config, "calibrate")
    report_scaling(records, metrics, error)
    return changed, records, {**metrics, "equivalence_error": error}, moved

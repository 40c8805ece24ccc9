"""Records of scaling factors: manifest entries and the table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts import Manifest
from dqtool.artifacts.records import LayerRecord, ScalingRecord
from dqtool.graph.trace import LayerInfo
from dqtool.scaling.groups import scaling_groups
from dqtool.scaling.methods import METHODS, ScalingMethod, ScalingResult

__all__ = [
    "dilated_layers",
    "layer_scales",
    "method_used",
    "report_scaling",
    "scaling_metrics",
    "scaling_of",
    "scaling_record",
    "with_figures",
    "with_folds",
    "with_learned_scales",
]


def layer_scales(layers: Sequence[LayerInfo], chosen: Mapping[str, ScalingResult]) -> dict[str, Tensor]:
    """Return the factors `[C_in]` of every scaled layer by name, each a tensor of its own; `chosen` is by group owner."""
    return {
        info.name: chosen[owner].scale.clone()
        for owner, members in scaling_groups(layers).items()
        if owner in chosen
        for info in members
    }


def method_used(asked: ScalingMethod, result: ScalingResult) -> ScalingMethod:
    """Return the method whose factors these are: the one that was asked, or the one that it chose."""
    return asked if result.method is None else METHODS[result.method]


def scaling_record(asked: ScalingMethod, result: ScalingResult) -> ScalingRecord:
    """Return a layer's `scaling` entry in the manifest."""
    used = method_used(asked, result)
    made = ScalingRecord(used.name, asked=None if used is asked else asked.name)
    return with_figures(made, result.scale)


def with_figures(record: ScalingRecord, scale: Tensor) -> ScalingRecord:
    """Return the record with the share of a layer's factors `[C_in]` above 1, their mean, maximum and mean inverse."""
    return replace(
        record,
        unsaturated_share=float((scale > 1).float().mean()),
        mean=float(scale.mean()),
        max=float(scale.max()),
        mean_inverse=float((1 / scale).mean()),
    )


def scaling_metrics(scales: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the same figures over all in-channels of the scaled layers."""
    every = torch.cat(list(scales.values())) if scales else torch.ones(1)
    return {
        "unsaturated_share": float((every > 1).float().mean()),
        "mean_dilation": float(every.mean()),
        "mean_inverse": float((1 / every).mean()),
    }


def scaling_of(manifest: Manifest, name: str) -> ScalingRecord:
    """Return a layer's `scaling` entry; an empty one for a layer that is not scaled."""
    return next(layer.scaling or ScalingRecord() for layer in manifest.layers if layer.name == name)


def dilated_layers(manifest: Manifest) -> set[str]:
    """Return the names of the layers that divide their input, in a dilated or calibrated artifact."""
    return {
        layer.name
        for layer in manifest.layers
        if layer.scaling is not None and layer.scaling.folded_into is None and not layer.rotation
    }


def with_learned_scales(
    records: Sequence[LayerRecord], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> list[LayerRecord]:
    """Return the layers' records with the figures of factors that training moved.

    `before` and `after` hold `X.dilation` before and after training.
    """
    updated = []
    for record in records:
        name = f"{record.name}.dilation"
        if name in before and name in after and not torch.equal(before[name], after[name]):
            scaling = replace(record.scaling or ScalingRecord(), learned=True)
            record = replace(record, scaling=with_figures(scaling, after[name]))
        updated.append(record)
    return updated


def with_folds(records: Sequence[LayerRecord], folded: Mapping[str, list[str]]) -> list[LayerRecord]:
    """Return the layers' records with the producers that their factors were folded into, by layer."""
    return [
        replace(record, scaling=replace(record.scaling or ScalingRecord(), folded_into=folded[record.name]))
        if record.name in folded
        else record
        for record in records
    ]


def report_scaling(records: Sequence[LayerRecord], metrics: Mapping[str, float], error: float) -> None:
    """Show the factors on the terminal: a row for each scaled layer, and a summary."""
    rows = [
        (
            record.name,
            "x".join(map(str, record.shape)),
            f"{record.scaling.unsaturated_share:.1%}",
            f"{record.scaling.mean_inverse:.3f}",
            f"{record.scaling.max:.2f}",
        )
        for record in records
        if record.scaling is not None
    ]
    report.table("Weight dilation", ["layer", "weight", "unsaturated", "mean 1/s", "max s"], rows)
    report.say(
        f"output unchanged to {error:.1e} relative; {metrics['unsaturated_share']:.1%} of "
        f"in-channels dilated, mean 1/s {metrics['mean_inverse']:.3f}"
    )

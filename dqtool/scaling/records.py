"""What manifests and terminals are told about the scales that were chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dqtool import report
from dqtool.graph.trace import LayerInfo
from dqtool.scaling.choosing import groups_of
from dqtool.scaling.methods import SCALINGS, ScalingMethod, ScalingResult

__all__ = ["figures", "method_used", "scales_of", "scaling_metrics", "scaling_record", "tell_scaling"]


def scales_of(layers: list[LayerInfo], chosen: Mapping[str, ScalingResult]) -> dict[str, Tensor]:
    """The factors `[C_in]` of every scaled layer, by name; each has its own."""
    return {
        info.name: chosen[owner].scale.clone()
        for owner, members in groups_of(layers).items()
        if owner in chosen
        for info in members
    }


def method_used(asked: ScalingMethod, result: ScalingResult) -> ScalingMethod:
    """The method whose scale it is: the one asked, or the one that it chose."""
    return asked if result.method is None else SCALINGS[result.method]


def scaling_record(asked: ScalingMethod, result: ScalingResult) -> dict[str, Any]:
    """What a manifest says about the scale of a layer."""
    used = method_used(asked, result)
    return {"method": used.name, **figures(result.scale), **({} if used is asked else {"asked": asked.name})}


def figures(scale: Tensor) -> dict[str, float]:
    """Of a layer's factors `[C_in]`: the share above 1, their mean, largest and mean inverse."""
    return {
        "unsaturated_share": float((scale > 1).float().mean()),
        "mean": float(scale.mean()),
        "max": float(scale.max()),
        "mean_inverse": float((1 / scale).mean()),
    }


def scaling_metrics(scales: Mapping[str, Tensor]) -> dict[str, float]:
    """The same over all in-channels of the scaled layers."""
    every = torch.cat(list(scales.values())) if scales else torch.ones(1)
    return {
        "unsaturated_share": float((every > 1).float().mean()),
        "mean_dilation": float(every.mean()),
        "mean_inverse": float((1 / every).mean()),
    }


def tell_scaling(records: list[dict[str, Any]], metrics: dict[str, Any], error: float) -> None:
    """Show what was chosen: a row a scaled layer, and the whole."""
    rows = [
        (
            record["name"],
            "x".join(map(str, record["shape"])),
            f"{record['scaling']['unsaturated_share']:.1%}",
            f"{record['scaling']['mean_inverse']:.3f}",
            f"{record['scaling']['max']:.2f}",
        )
        for record in records
        if "scaling" in record
    ]
    report.table("Weight dilation", ["layer", "weight", "unsaturated", "mean 1/s", "max s"], rows)
    report.say(
        f"output unchanged to {error:.1e} relative; {metrics['unsaturated_share']:.1%} of "
        f"in-channels dilated, mean 1/s {metrics['mean_inverse']:.3f}"
    )

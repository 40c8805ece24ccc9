"""Dilation of a network from its weights alone, the work of `dqtool dilate`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from dqtool.artifacts import DeferredTensors
from dqtool.artifacts.records import LayerRecord
from dqtool.core.threads import operation_threads
from dqtool.graph.trace import LayerInfo
from dqtool.models.networks.packed import layer_record
from dqtool.scaling.choosing import choose_by_weights
from dqtool.scaling.folding import Fold, fold_scales
from dqtool.scaling.methods import ScalingMethod
from dqtool.scaling.records import layer_scales, scaling_metrics, scaling_record, with_folds

__all__ = ["Dilated", "dilate_network"]


@dataclass(frozen=True)
class Dilated:
    """A dilated network.

    Attributes:
        tensors: the network's state with `X.dilation` `[C_in]`; dilated weights are computed when they are read.
        scales: factors that are not folded, `[C_in]`, by layer.
        records: the layers as manifests have them.
        metrics: figures over all layers.
    """

    tensors: DeferredTensors
    scales: dict[str, Tensor]
    records: list[LayerRecord]
    metrics: dict[str, float]


def dilate_network(
    network: nn.Module,
    state: Mapping[str, Tensor],
    layers: Sequence[LayerInfo],
    method: ScalingMethod,
    cap: float,
    threshold: float,
    folds: Iterable[Fold] = (),
) -> Dilated:
    """Return `network` with the weights of `layers` multiplied by the method's factors; the network is left as it is.

    `state` holds the network's tensors; `folds` are applied to the producers of the layers' inputs.
    """
    chosen = choose_by_weights(network, layers, method, cap, threshold)
    scales = layer_scales(layers, chosen)
    tensors = DeferredTensors(dict(state))
    records = []
    for info in layers:
        record = layer_record(info)
        if info.name in scales:
            name, scale = f"{info.name}.weight", scales[info.name]
            # Computed when it is written, so that the whole network need not fit into memory twice.
            rows = partial(_scaled_rows, method, state[name], scale, info.groups)
            tensors.defer(name, state[name], rows, rows if info.groups == 1 else None)
            tensors[f"{info.name}.dilation"] = scale
            record = replace(record, scaling=scaling_record(method, chosen[info.shares or info.name]))
        records.append(record)
    folded = fold_scales(tensors, folds, crossing=True)
    scales = {name: scale for name, scale in scales.items() if name not in folded}
    return Dilated(tensors, scales, with_folds(records, folded), scaling_metrics(scales))


def _scaled_rows(
    method: ScalingMethod, weight: Tensor, scale: Tensor, groups: int, rows: slice = slice(None)
) -> Tensor:
    """Return rows of the scaled weight (all of them for a grouped convolution), computed by one thread."""
    with operation_threads(1):
        return method.apply(weight[rows], scale, groups)

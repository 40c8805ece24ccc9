"""Size of the packed file and bit operations of a network whose layers have given bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dqtool.artifacts import Manifest

if TYPE_CHECKING:
    from dqtool.nn.assignment import LayerPlan

__all__ = ["packed_size", "prediction_rows_of", "without_folds"]


def without_folds(manifest: Manifest, plans: Iterable[LayerPlan]) -> list[LayerPlan]:
    """Return the plans of a calibrated artifact's layers, where factors that `distill` will fold are no longer in files."""
    from dqtool.scaling.folding import pending_folds

    plans = list(plans)
    branched = {plan.info.name for plan in plans if plan.low_rank}
    folded = {name for found in pending_folds(manifest, branched) for name in found.layers}
    return [replace(plan, dilated=plan.dilated and plan.info.name not in folded) for plan in plans]


def prediction_rows_of(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Return the row shapes of the tables that will correct the network's predictions, by name."""
    from dqtool.models.families import family_of
    from dqtool.nn.prediction import row_shapes

    return row_shapes(family_of(manifest.network.class_name, "manifest").prediction_row(manifest.network.config))


def packed_size(
    manifest: Manifest,
    plans: Sequence[LayerPlan],
    timesteps: int,
    prediction: Mapping[str, tuple[int, ...]] | None = None,
) -> dict[str, int]:
    """Return the bytes of the packed file and bit operations per forward pass, beside those of float32."""
    from dqtool.core.cost import bops, float_bops
    from dqtool.formats.shapes import network_shapes, predicted_bytes
    from dqtool.models.families import family_of
    from dqtool.models.networks.packed import planned_record
    from dqtool.nn.surgery import state_shapes

    family = family_of(manifest.network.class_name, "manifest")
    shapes = network_shapes(family, manifest.network.config, manifest.layers)
    return {
        "bytes": predicted_bytes(state_shapes(shapes, plans, timesteps, prediction)),
        "bytes_float32": predicted_bytes(shapes),
        "bops": bops(map(planned_record, plans)),
        "bops_float32": float_bops(manifest.layers),
    }

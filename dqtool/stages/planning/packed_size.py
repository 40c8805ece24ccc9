"""Size of the packed file and bit operations of a network whose layers have given bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

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
    """Row shapes of the tables that will correct the network's predictions, by name."""
    from dqtool.models.families import family_of
    from dqtool.nn.prediction import row_shapes

    return row_shapes(family_of(manifest.model["class"], "manifest").prediction_row(manifest.model["config"]))


def packed_size(
    manifest: Manifest, plans: Sequence[Any], timesteps: int, prediction: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Any]:
    """Bytes of the packed file and bit operations per forward pass, beside those of float32."""
    from dqtool.core.cost import bops
    from dqtool.formats.shapes import network_shapes, predicted_bytes
    from dqtool.models.families import family_of
    from dqtool.nn.surgery import state_shapes

    family = family_of(manifest.model["class"], "manifest")
    shapes = network_shapes(family, manifest.model["config"], manifest.layers)
    return {
        "bytes": predicted_bytes(state_shapes(shapes, plans, timesteps, prediction)),
        "bytes_float32": predicted_bytes(shapes),
        "bops": bops(plan.summary() for plan in plans),
        "bops_float32": bops({"macs": layer["macs"], "bits": None} for layer in manifest.layers),
    }

"""Bits that depend on measured errors, as `distill` asks for them: its parameters, and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dqtool.artifacts import Artifact
from dqtool.core.quantization import QuantizationSpec
from dqtool.stages.options.distill import AUTO, DistillOptions, corrects_predictions

__all__ = ["chosen_by_errors", "settle_bits"]


def chosen_by_errors(options: DistillOptions) -> dict[str, Any]:
    """Parameters of bits that depend on measured errors; none where they don't."""
    if not options.measures:
        return {}
    found: dict[str, Any] = {"passes": options.passes, "precision_version": 1}
    if options.bits == AUTO:
        return found | {"bits": AUTO, "targets": options.targets.to_json()}
    return found | {"protect": options.protect}


def settle_bits(
    calibrated: Artifact, tensors: Mapping[str, Any], options: DistillOptions, spec: QuantizationSpec
) -> tuple[QuantizationSpec, dict[str, Any]]:
    """Return the bits of every layer, measured where the options ask for it, and what the manifest says of the choice."""
    if not options.measures:
        return spec, {}
    from dqtool.nn.assignment import with_branches
    from dqtool.scaling.records import dilated_layers
    from dqtool.stages.planning.packed_size import packed_size, prediction_rows_of, without_folds
    from dqtool.stages.precision import choose_bits, measure, protected_bits

    manifest = calibrated.manifest
    measured = measure(manifest, tensors, options.passes)
    if options.bits != AUTO:
        spec = protected_bits(measured, spec, options.protect / 100)
        return spec, {"protected": [str(kept) for kept in spec.kept]}
    steps = 1 if options.static else len(tensors["timesteps"])
    rows = prediction_rows_of(manifest) if corrects_predictions(options) else {}
    divided = dilated_layers(manifest)

    def size(plans: Any) -> tuple[int, int]:
        plans = [replace(plan, dilated=plan.info.name in divided) for plan in plans]
        plans = without_folds(manifest, with_branches(plans, options.low_rank))
        work = packed_size(manifest, plans, steps, rows)
        return work["bytes"], work["bops"]

    spec, about = choose_bits(measured, options.targets, spec.kept, size)
    return spec, {"precision": about | {"keep": [str(kept) for kept in spec.kept]}}

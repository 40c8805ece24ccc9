"""Bits that depend on measured errors, as `distill` asks for them: its parameters, and the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, Manifest, Workspace
from dqtool.artifacts.jsonvalues import Json
from dqtool.core.bits import LayerBits
from dqtool.core.quantization import QuantizationSpec
from dqtool.stages.options.distill import AUTO, DistillOptions, corrects_predictions

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["chosen_bits", "chosen_by_errors"]

PROTECTED = (30.0, 40.0, 50.0, 60.0)
"""Percent of bytes and of bit operations that protection may add where it is the tool that decides: the first, or the least that
is predicted to give the PSNR of `least_psnr`, which heavy tails and few steps need."""
LEAST = 30.0
"""dB of predicted PSNR, before training, below which samples differ visibly from full precision's."""
ENOUGH = 40.0
"""dB of predicted PSNR that need no (more) protection: a root mean square error of a hundredth of the range."""
LOOKS = 8
"""Backward passes of the first look, which decides whether bits need protection."""
WEIGHTS = range(10**6, 2 * 10**8)
"""Sizes of the networks that get the first look: it costs more than it brings below, and takes minutes above."""


def chosen_by_errors(options: DistillOptions, manifest: Manifest) -> dict[str, Json]:
    """Return the parameters of bits that depend on measured errors; none where bits don't."""
    found: dict[str, Json] = {"passes": options.passes, "precision_version": 2}
    if options.bits == AUTO:
        return found | {"bits": AUTO, "targets": options.targets.to_json()}
    if options.protect:
        return found | {"protect": options.protect}
    if looks_first(options, manifest):
        return found | {
            "protect": {
                "below": ENOUGH,
                "percent": list(PROTECTED),
                "looks": LOOKS,
                "least": least_psnr(options.spec.bits),
            }
        }
    return {}


def looks_first(options: DistillOptions, manifest: Manifest) -> bool:
    """Return whether the errors of uniform bits are measured to decide about protection."""
    return options.may_protect and weight_count(manifest) in WEIGHTS


def least_psnr(bits: LayerBits) -> float:
    """Return the dB of predicted PSNR that protection goes on for. 8 bits of both operands are for images that hold."""
    return ENOUGH if min(bits.weight, bits.input) >= 8 else LEAST


def weight_count(manifest: Manifest) -> int:
    """Return the number of weights of the layers that are quantized."""
    return sum(prod(layer.shape) for layer in manifest.layers if layer.kind != "attention")


def chosen_bits(
    calibrated: Artifact,
    tensors: Mapping[str, Tensor],
    options: DistillOptions,
    spec: QuantizationSpec,
    workspace: Workspace,
) -> tuple[QuantizationSpec, dict[str, Json]]:
    """Return the bits of every layer, measured where the options ask for it, and what the manifest says of the choice.

    `workspace` keeps the measurements at hand for an interrupted run.
    """
    manifest = calibrated.manifest
    if options.bits == AUTO:
        return _chosen(manifest, tensors, options, spec, workspace)
    shares: tuple[float, ...] = (options.protect,) if options.protect else ()
    if looks_first(options, manifest) and _needs_protection(manifest, tensors, spec, workspace):
        shares = PROTECTED
    if not shares:
        return spec, {}
    from dqtool.stages.precision import measure, protected_bits

    measured = measure(manifest, tensors, options.passes, workspace=workspace)
    spec, about = protected_bits(measured, spec, [percent / 100 for percent in shares], least_psnr(spec.bits))
    return spec, {"protected": about}


def _needs_protection(
    manifest: Manifest, tensors: Mapping[str, Any], spec: QuantizationSpec, workspace: Workspace
) -> bool:
    """Return whether these bits are predicted to give samples of less than `ENOUGH` dB."""
    from dqtool.precision.frontier import psnr_of
    from dqtool.stages.precision import measure, uniform_plan

    widths = {bits for bits in (spec.bits.weight, spec.bits.input) if bits <= 8}
    predicted = psnr_of(uniform_plan(measure(manifest, tensors, LOOKS, sorted(widths), workspace), spec).error)
    if predicted < ENOUGH:
        report.say(
            f"distill: {spec.bits} is predicted to give {predicted:.1f} dB before training: the costliest operands get more "
            "bits (--protect 0 leaves them)"
        )
    return predicted < ENOUGH


def _chosen(
    manifest: Manifest,
    tensors: Mapping[str, Any],
    options: DistillOptions,
    spec: QuantizationSpec,
    workspace: Workspace,
) -> tuple[QuantizationSpec, dict[str, Any]]:
    """Return the bits that reach the targets of `--bits auto`."""
    from dqtool.nn.assignment import with_branches
    from dqtool.scaling.records import dilated_layers
    from dqtool.stages.planning.packed_size import packed_size, prediction_rows_of, without_folds
    from dqtool.stages.precision import choose_bits, measure

    measured = measure(manifest, tensors, options.passes, workspace=workspace)
    steps = 1 if options.static else len(tensors["timesteps"])
    rows = prediction_rows_of(manifest) if corrects_predictions(options) else {}
    divided = dilated_layers(manifest)

    def size(plans: Any) -> tuple[int, int]:
        plans = [replace(plan, dilated=plan.info.name in divided) for plan in plans]
        plans = without_folds(manifest, with_branches(plans, options.low_rank))
        work = packed_size(manifest, plans, steps, rows)
        return work["bytes"], work["bops"]

    spec, about = choose_bits(measured, options.targets, spec.kept, size, workspace)
    return spec, {"precision": about | {"keep": [str(kept) for kept in spec.kept]}}

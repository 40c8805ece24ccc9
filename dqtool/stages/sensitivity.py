"""`dqtool sensitivity`: what quantizing each operand alone costs in the samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import Artifact, Workspace, read_manifest
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.records import OperandRecord, SensitivityRecord
from dqtool.stages.options.sensitivity import SensitivityOptions
from dqtool.stages.shared.paths import read_paths
from dqtool.stages.shared.running import RunSettings, StageOutput, input_artifact, run_unless_cached

if TYPE_CHECKING:
    from dqtool.core.bits import LayerBits

__all__ = ["SensitivityOptions", "sensitivity"]

CODE_VERSION = 2

KEPT_SHARE = 0.9
"""Share of the error that the suggested `--keep` options take away."""


def sensitivity(options: SensitivityOptions, settings: RunSettings) -> str:
    """Write the report, show its head as a table; returns the report's path as given.

    Raises:
        ArtifactError: the input is not calibrated.
    """
    calibrated = input_artifact(options.artifact, ["calibrate"], "calibrate")
    parameters: dict[str, Json] = {"bits": options.bits, "passes": options.passes}
    inputs = [calibrated.as_input()]
    run_unless_cached(
        "sensitivity",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        settings,
        lambda key: produce(calibrated, options, Workspace(options.output, key, forced=settings.force)),
        kind="report",
        reads=read_paths(options),
    )
    if not settings.dry_run:
        found = read_manifest(options.output).metrics
        assert isinstance(found, SensitivityRecord)
        print_operands(found, options)
    return options.output


def produce(calibrated: Artifact, options: SensitivityOptions, workspace: Workspace) -> StageOutput:
    """Measure every operand and every plan. `workspace` keeps what is measured for an interrupted run."""
    from dqtool.core.quantization import QuantizationSpec
    from dqtool.models.networks.checked_artifacts import checked_tensors
    from dqtool.precision.frontier import find_frontier, psnr_of
    from dqtool.precision.sensitivity import WEIGHT
    from dqtool.stages.precision import WIDTHS, frontier_rows, measure, uniform_plan

    manifest, bits = calibrated.manifest, options.layer_bits
    widths = sorted({*WIDTHS, *(b for b in (bits.weight, bits.input) if b <= 8)})
    measured = measure(manifest, checked_tensors(calibrated), options.passes, widths, workspace)
    plan = uniform_plan(measured, QuantizationSpec.parse(options.bits))
    operands: list[OperandRecord] = []
    for (layer, operand), errors in measured.errors.items():
        own = plan.bits[layer]  # the first and the last layers have more than the others
        width = own.weight if operand == WEIGHT else own.input
        by_width = {str(b): min(psnr_of(e), 100.0) for b, e in errors.items()}
        error = errors.get(width, 0.0)
        operands.append(OperandRecord(layer, operand, width, error, by_width, share=0.0))
    total = sum(each.error for each in operands) or 1.0
    operands = [replace(each, share=each.error / total) for each in operands]
    operands.sort(key=lambda each: -each.error)
    metrics = SensitivityRecord(
        operands=operands,
        predicted_psnr=min(psnr_of(plan.error), 100.0),
        keep=keep_lines(operands, plan.bits),
        frontier=frontier_rows(measured, find_frontier(measured.layers, measured.errors, widths), {}),
    )
    return StageOutput(
        None,
        manifest.network,
        manifest.pipeline,
        [],
        metrics.to_json(),
        earlier_seconds=workspace.earlier_seconds(),
    )


def keep_lines(operands: Sequence[OperandRecord], bits: Mapping[str, LayerBits]) -> list[str]:
    """Return the `--keep` options that bring the costliest operands to 8 bits, or to float where 8 are too few already."""
    from dqtool.precision.sensitivity import WEIGHT

    finer: dict[str, list[int]] = {}
    taken = 0.0
    for each in operands:
        if taken >= KEPT_SHARE:
            break
        own = finer.setdefault(each.layer, bits[each.layer].to_json())
        side = 0 if each.operand == WEIGHT else 1
        own[side] = 8 if own[side] < 8 else 16
        taken += each.share
    groups: dict[str, list[str]] = {}
    for name, (w, a) in finer.items():
        groups.setdefault(f"{w}/{a}", []).append(re.escape(name))
    return [f"{'|'.join(names)}={widths}" for widths, names in groups.items()]


def print_operands(metrics: SensitivityRecord, options: SensitivityOptions) -> None:
    """Show the costliest operands, the frontier and the options to type."""
    from dqtool.precision.table import print_frontier

    rows = []
    for each in metrics.operands[: options.top]:
        width = each.bits
        rows.append((each.layer, each.operand, width, f"{each.psnr.get(str(width), 100.0):.1f}", f"{each.share:.1%}"))
    report.table(
        f"{options.bits}: PSNR of samples when one operand alone is quantized",
        ["layer", "operand", "bits", "PSNR", "share"],
        rows,
    )
    report.say(f"all of them at {options.bits}: predicted PSNR {metrics.predicted_psnr:.1f} dB before training")
    print_frontier(metrics.frontier)
    for line in metrics.keep:
        report.say(f"to type: --keep '{line}'")
    report.say("or let `dqtool distill --bits auto --target-psnr F` choose")

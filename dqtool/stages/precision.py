"""Bits chosen by measured errors: what `sensitivity` reports and `distill --bits auto` and `--protect` choose by."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import CallCheckpoints, Checkpoints, Manifest, Workspace
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.records import PlanRecord
from dqtool.core.bits import LayerBits
from dqtool.core.device import to_cpu
from dqtool.core.quantization import KeptLayers, QuantizationSpec
from dqtool.errors import UsageError
from dqtool.graph.trace import LayerInfo
from dqtool.metrics.similarity import psnr
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.models.sampling.sampler import CALIBRATION, Sampler, image_seeds, initial_noise
from dqtool.nn.assignment import LayerPlan, assign_bits, digest_of
from dqtool.nn.statistics import initial_tables
from dqtool.precision.frontier import (
    Plan,
    best_within,
    bits_by_name,
    find_frontier,
    kept_layers,
    plan_cost,
    psnr_of,
)
from dqtool.precision.frontier import quantization_error as predicted_error
from dqtool.precision.kept_errors import kept_errors
from dqtool.precision.sensitivity import Errors, measure_errors
from dqtool.precision.step_weights import step_weights
from dqtool.precision.table import print_frontier
from dqtool.stages.options.distill import Targets
from dqtool.stages.shared.artifact_models import split_dilated, student_of, student_without_grids, teacher_of
from dqtool.training.data import Trajectory

__all__ = ["UNIFORM", "MeasuredErrors", "choose_bits", "frontier_rows", "measure", "protected_bits", "uniform_plan"]

WIDTHS = (3, 4, 5, 6, 7, 8)
UNIFORM = ("8/8", "6/8", "6/6", "4/8", "4/6", "4/4", "3/3")
"""Uniform settings that a frontier is shown beside."""

CHECKED_IMAGES, CHECKED_TOGETHER = 8, 4
"""Images that a plan is measured on before it is chosen, and how many run at once."""
CHECKS = 7
"""Plans that are measured at most."""
SEED_STRIDE, SEED_OFFSET = 7_919, 3_000_017
"""The images of the checks share no noise with calibration, training or evaluation."""


@dataclass
class MeasuredErrors:
    """Errors of every operand of a calibrated artifact, with what plans are made from."""

    manifest: Manifest
    tensors: Mapping[str, Tensor]
    layers: list[LayerInfo]
    errors: Errors
    sampler: Sampler
    trajectory: Trajectory

    def plans(self, spec: QuantizationSpec) -> list[LayerPlan]:
        """Return the layers with the bits of a specification."""
        return assign_bits(self.layers, spec, split_dilated(self.tensors)[1])

    def predicted(self, plans: Sequence[LayerPlan]) -> float:
        """Return the predicted error of the samples of a network with these bits."""
        return predicted_error(self.layers, bits_by_name(plans), self.errors)


def measure(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    passes: int,
    widths: Sequence[int] = WIDTHS,
    workspace: Workspace | None = None,
) -> MeasuredErrors:
    """Return the error of every operand of a calibrated artifact, by `passes` backward passes; measured once and kept.

    `workspace` keeps finished passes for an interrupted run.
    """
    family, config = network_of(manifest.network)
    layers = layer_infos(manifest.layers)
    widths = sorted({*widths, 8})
    sampling = manifest.sampling
    assert sampling is not None
    sampler = Sampler.calibrated(family, config, sampling, 1.0 if sampling.guidance is None else sampling.guidance)
    trajectory = Trajectory.from_tensors(tensors)

    def measured() -> Errors:
        found = _measured_errors(manifest, tensors, sampler, trajectory, passes, widths, workspace)
        gc.collect()  # cycles of its hooks would keep the measured network beside the one that is trained
        return found

    if manifest.file is None:
        errors = measured()
    else:
        errors = kept_errors({"artifact": manifest.file.sha256, "passes": passes, "widths": widths}, measured)
    return MeasuredErrors(manifest, tensors, layers, errors, sampler, trajectory)


def _measured_errors(
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    sampler: Sampler,
    trajectory: Trajectory,
    passes: int,
    widths: Sequence[int],
    workspace: Workspace | None,
) -> Errors:
    """Return the error of every operand, measured by `passes` backward passes."""
    name = f"{passes} passes at {','.join(map(str, widths))} bits"
    family, layers = sampler.family, layer_infos(manifest.layers)
    tables, plans = {}, []
    for bits in widths:
        spec = QuantizationSpec(LayerBits(bits, bits), kept=(KeptLayers(".*", LayerBits(bits, bits)),))
        plans = assign_bits(layers, spec, split_dilated(tensors)[1])
        tables[bits] = initial_tables(plans, tensors)
    network = student_without_grids(manifest, tensors, plans)
    weights = step_weights(sampler, trajectory)
    weights *= len(weights) ** 0.5  # the passes average over steps, and the steps' errors add up
    order = points_of_passes(trajectory, passes)

    def runs() -> Iterator[tuple[float, Callable[[], Tensor]]]:
        with report.progress("sensitivity", len(order), "pass") as progress:
            for number, index in enumerate(order):
                point = slice(index, index + 1)

                def run(point: slice = point) -> Tensor:
                    return family.predict(network, *trajectory.arguments(point))

                yield float(weights[trajectory.rows[index]]), run
                if kept is not None and number in kept.found:
                    progress.skip()
                else:
                    progress.advance()

    kept = None if workspace is None else Checkpoints(workspace, name)
    grids = None if workspace is None else Checkpoints(workspace, f"grids of {name}")
    return measure_errors(network, plans, tables, widths, runs(), kept, grids)


def points_of_passes(trajectory: Trajectory, passes: int) -> list[int]:
    """Return one trajectory point for each pass, spread evenly over the steps."""
    order = torch.randperm(len(trajectory), generator=torch.Generator().manual_seed(0))
    by_step = order[trajectory.rows[order].argsort(stable=True)]
    places = ((torch.arange(passes) + 0.5) / passes * len(by_step)).long()
    return by_step[places].tolist()


def uniform_plan(measured: MeasuredErrors, spec: QuantizationSpec) -> Plan:
    """Return a specification's plan with its predicted error and its cost."""
    bits = bits_by_name(measured.plans(spec))
    return Plan(bits, predicted_error(measured.layers, bits, measured.errors), *plan_cost(measured.layers, bits))


def protected_bits(
    measured: MeasuredErrors, spec: QuantizationSpec, shares: Sequence[float], least: float
) -> tuple[QuantizationSpec, dict[str, Json]]:
    """Return `spec` with more bits for the operands that cost the samples most, and what the manifest says of it.

    The first of `shares` is what they may add to its bytes and to its bit operations. Each further share is allowed where
    the one before leaves the predicted PSNR below `least` dB.
    """
    plain = best = uniform_plan(measured, spec)
    for share in shares:
        limits = plain.weight_bytes * (1 + share), plain.bops * (1 + share)
        found = best_within(measured.layers, measured.errors, WIDTHS, plain.bits, *limits)
        best = best if found is None or found.error >= best.error else found
        if psnr_of(best.error) >= least:
            break
    changed = {name: bits for name, bits in best.bits.items() if bits != plain.bits[name]}
    more_bytes, more_bops = best.weight_bytes / max(plain.weight_bytes, 1) - 1, best.bops / max(plain.bops, 1) - 1
    report.say(
        f"distill: {len(changed)} layers protected for {more_bytes:.1%} more bytes and {more_bops:.1%} more bit operations; "
        f"predicted PSNR {psnr_of(plain.error):.1f} to {psnr_of(best.error):.1f} dB before training"
    )
    spec = replace(spec, kept=(*spec.kept, *kept_layers(changed)))
    about: dict[str, Json] = {
        "layers": len(changed),
        "more_bytes": more_bytes,
        "more_bops": more_bops,
        "predicted_psnr": [min(psnr_of(plan.error), 100.0) for plan in (plain, best)],
        "keep": [str(kept) for kept in spec.kept],
    }
    return spec, about


def choose_bits(
    measured: MeasuredErrors,
    targets: Targets,
    own: Sequence[KeptLayers],
    size: Callable[[Sequence[LayerPlan]], tuple[int, int]],
    workspace: Workspace,
) -> tuple[QuantizationSpec, dict[str, Json]]:
    """Return the cheapest plan that reaches the PSNR asked for, or the best within the size and bit operations asked for,
    and what the manifest says of it. `own` are the user's `--keep` options; `size` counts a plan's bytes and bit operations;
    `workspace` keeps the plans' samples for an interrupted run.

    Raises:
        UsageError: no plan meets the targets.
    """
    frontier = find_frontier(measured.layers, measured.errors, WIDTHS)
    specs = [QuantizationSpec(LayerBits(8, 8), kept=(*kept_layers(plan.bits), *own)) for plan in frontier]
    costs = [size(measured.plans(spec)) for spec in specs]
    most_bytes = None if targets.megabytes is None else targets.megabytes * 1e6
    most_bops = None if targets.gigabops is None else targets.gigabops * 1e9
    allowed = [
        i
        for i, (used, operations) in enumerate(costs)
        if (most_bytes is None or used <= most_bytes) and (most_bops is None or operations <= most_bops)
    ]
    if not allowed:
        raise UsageError(
            f"No choice of bits fits: the coarsest takes {min(c[0] for c in costs) / 1e6:.2f} MB and "
            f"{min(c[1] for c in costs) / 1e9:.4g} giga bit operations",
            where="--target-size, --target-bops",
            fix="Allow more",
        )
    reference = _Checks(measured, workspace)
    found: dict[int, float] = {}
    if targets.psnr is None:
        chosen = _best_of(allowed, specs, reference, found)
    else:
        chosen = _cheapest(allowed, frontier, specs, reference, found, targets.psnr)
    plan, (used, operations) = frontier[chosen], costs[chosen]
    rows = frontier_rows(measured, frontier, found)
    print_frontier(rows)
    report.say(
        f"distill: bits chosen for {len(measured.layers)} layers: PSNR {found[chosen]:.1f} dB before training (predicted "
        f"{psnr_of(plan.error):.1f}), {used / 1e6:.2f} MB, {operations / 1e9:.4g} giga bit operations"
    )
    about: dict[str, Json] = {
        "psnr": found[chosen],
        "predicted_psnr": min(psnr_of(plan.error), 100.0),
        "bytes": used,
        "bops": operations,
        "frontier": [row.to_json() for row in rows],
    }
    return specs[chosen], about


def _best_of(
    allowed: Sequence[int], specs: Sequence[QuantizationSpec], checks: _Checks, found: dict[int, float]
) -> int:
    """Return the plan of greatest measured PSNR among the finest that are allowed."""
    for i in reversed(allowed[-2:]):
        found[i] = checks.psnr(specs[i], f"plan {i}")
    return max(found, key=lambda i: found[i])


def _cheapest(
    allowed: Sequence[int],
    plans: Sequence[Plan],
    specs: Sequence[QuantizationSpec],
    checks: _Checks,
    found: dict[int, float],
    target: float,
) -> int:
    """Return the cheapest plan found whose measured PSNR reaches `target`: measure the one that is predicted to reach it,
    then halve what is left between one that fails and one that does not.

    Raises:
        UsageError: none of them reaches it.
    """
    low, high = -1, len(allowed)
    place = next((k for k, i in enumerate(allowed) if psnr_of(plans[i].error) >= target), high - 1)
    for step in range(CHECKS):
        found[allowed[place]] = checks.psnr(specs[allowed[place]], f"plan {allowed[place]}")
        if found[allowed[place]] >= target:
            high = place
        else:
            low = place
        if high - low <= 1:
            break
        near = 2**step  # from the prediction on in growing strides, until the target lies between two measurements
        place = (
            max(high - near, 0) if low < 0 else min(low + near, high - 1) if high == len(allowed) else (low + high) // 2
        )
    if high == len(allowed):
        raise UsageError(
            f"No choice of bits reaches {target:g} dB: the best that fits measures {max(found.values()):.1f} dB",
            where="--target-psnr",
            fix="Ask for less, allow more bytes or bit operations, or calibrate with more samples",
        )
    return allowed[high]


class _Checks:
    """Samples of the full-precision network, and how near those of a plan are."""

    def __init__(self, measured: MeasuredErrors, workspace: Workspace) -> None:
        self.measured, self.workspace = measured, workspace
        trajectory, guided = measured.trajectory, measured.sampler.guidance > 1
        generator = torch.Generator().manual_seed(SEED_OFFSET)
        subjects = trajectory.draw_subjects(
            CHECKED_IMAGES, generator, guided and trajectory.null_conditions is not None
        )
        self.given = trajectory.condition_rows(subjects)
        self.null = trajectory.null_conditions if guided else None
        self.shape = tuple(trajectory.x.shape[1:])
        self.images = self.sample(partial(teacher_of, measured.manifest, measured.tensors), "the model")
        outside = float(self.images.abs().max()) > 1.5  # latents, whose range is their own
        self.range = float(self.images.max() - self.images.min()) if outside else 2.0

    def sample(self, make: Callable[[], nn.Module], name: str) -> Tensor:
        """Return the samples `[N, C, H, W]` of the network of this name that `make` builds."""
        kept = self.workspace.load(f"samples of {name}")
        if kept is not None:
            return kept["samples"]
        network, parts = make(), []
        calls = CallCheckpoints(self.workspace, f"samples of {name}")
        for start in range(0, CHECKED_IMAGES, CHECKED_TOGETHER):
            part = range(start, min(start + CHECKED_TOGETHER, CHECKED_IMAGES))
            noise = initial_noise(self.shape, part, SEED_STRIDE + SEED_OFFSET, CALIBRATION)
            seeds = image_seeds(part, SEED_STRIDE + SEED_OFFSET, CALIBRATION)
            given = {name: table[part.start : part.stop] for name, table in self.given.items()}
            parts.append(self.measured.sampler.run(network, noise, given, seeds, None, self.null, calls))
        samples = to_cpu(torch.cat(parts))  # where kept ones are
        self.workspace.save(f"samples of {name}", {"samples": samples})
        return samples

    def psnr(self, spec: QuantizationSpec, name: str) -> float:
        """Return the mean PSNR of the samples of the network with these bits, quantized without training."""
        measured = self.measured
        plans = measured.plans(spec)
        make = partial(student_of, measured.manifest, measured.tensors, plans, workspace=self.workspace, name=name)
        found = float(psnr(self.sample(make, f"{name} {digest_of(plans)}"), self.images, self.range).mean())
        report.say(f"distill: a plan measures {found:.1f} dB")
        return found


def frontier_rows(measured: MeasuredErrors, frontier: Sequence[Plan], found: Mapping[int, float]) -> list[PlanRecord]:
    """Return the frontier's rows, thinned out, among them those that were measured, and the uniform settings."""
    picked = sorted({*found, *range(0, len(frontier), 4), len(frontier) - 1})
    rows = [_row("auto", frontier[i], found.get(i)) for i in picked]
    rows += [_row(text, uniform_plan(measured, QuantizationSpec.parse(text))) for text in UNIFORM]
    return sorted(rows, key=lambda row: row.psnr)


def _row(bits: str, plan: Plan, measured_psnr: float | None = None) -> PlanRecord:
    return PlanRecord(bits, min(psnr_of(plan.error), 100.0), round(plan.weight_bytes), plan.bops, measured_psnr)

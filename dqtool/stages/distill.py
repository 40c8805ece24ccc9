"""`dqtool distill`: choose the bits, initialise the quantizers, train them with the weights, pack the result."""

from __future__ import annotations

import re
import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import Artifact, Workspace
from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.core.device import teacher_parameters
from dqtool.core.out_of_memory import with_smaller_batches
from dqtool.core.quantization import NONSTANDARD, PAPER, STANDARD, QuantizationSpec
from dqtool.errors import ArtifactError, UsageError
from dqtool.stages.measured_bits import chosen_bits, chosen_by_errors
from dqtool.stages.options.distill import (
    DistillOptions,
    corrects_predictions,
    method_and_options,
    repair_iters_of,
    with_sampler_defaults,
)
from dqtool.stages.shared.paths import read_paths
from dqtool.stages.shared.running import RunSettings, StageOutput, check_steps, input_artifact, run_unless_cached

if TYPE_CHECKING:
    from dqtool.artifacts import Manifest
    from dqtool.graph.trace import Trace
    from dqtool.training.data import Trajectory

__all__ = ["DistillOptions", "corrects_predictions", "distill", "scheduler_of", "with_sampler_defaults"]

CODE_VERSION = 4

CORRECT_IMAGES = 64
"""Images that `--correct-noise` fits the prediction tables on."""

TOGETHER = 256
"""Samples that run together where a block's inputs and outputs are computed, as long as the network is small and memory does not
run out."""
SAMPLED_TOGETHER = 64
"""Inputs that a network gets at once where it samples, as long as it is small and memory does not run out."""
LOW_MEMORY_BLOCK, LOW_MEMORY_NETWORK = 40, 8
"""Samples that run together with `--low-memory`: for a block's inputs and outputs, and for a whole network that learns or
samples."""


def distill(options: DistillOptions, settings: RunSettings) -> str:
    """Make the quantized artifact; returns its path as given.

    Raises:
        UsageError: a `--keep` pattern that matches no layer, or more training samples than there are.
        ArtifactError: the input is not calibrated, or was for another number of steps.
        NumericError: training diverged.
    """
    calibrated = input_artifact(options.artifact, ["calibrate"], "calibrate")
    check_steps(calibrated, options.steps)
    adapted = with_sampler_defaults(options, str(scheduler_of(calibrated.manifest).get("_class_name")))
    if adapted != options:
        report.say(
            "distill: this sampler extrapolates from several predictions, so the second pass and the correction of "
            "predictions are left out, unless --refine-iters or --correct-noise asks for them"
        )
    options = adapted
    check_samples(options.train_samples, calibrated.manifest)
    if options.preset == PAPER:
        check_paper(calibrated)
    spec = network_spec(options, calibrated.manifest)
    parameters = fingerprint_parameters(options) | spec.to_json() | chosen_by_errors(options, calibrated.manifest)
    inputs = [calibrated.as_input()]

    def work(key: str) -> StageOutput:
        workspace = Workspace(options.output, key, forced=settings.force)
        return with_smaller_batches(
            lambda together: produce(calibrated, options, spec, workspace, together),
            TOGETHER,
            "distill",
            smallest=2,
            fix="Lower --batch-size (32), which is what a block learns from at a time, or use a larger machine",
        )

    run_unless_cached(
        "distill", CODE_VERSION, options.output, parameters, inputs, settings, work, reads=read_paths(options)
    )
    return options.output


def check_paper(calibrated: Artifact) -> None:
    """Raise `ArtifactError` unless the input holds Weight Dilation's own factors, chosen from the weights alone."""
    manifest = calibrated.manifest
    methods = {layer.scaling.method for layer in manifest.layers if layer.scaling is not None}
    scaling = manifest.parameters.scaling or "keep"  # the manifest leaves keep out
    if scaling == "keep" and methods <= {"wd"} and methods:
        return
    found = f"calibrated with --scaling {scaling}" if scaling != "keep" else "not dilated by Weight Dilation"
    raise ArtifactError(
        f"--preset paper needs Weight Dilation's own factors, and this artifact was {found}",
        where=calibrated.given,
        fix="Run `dqtool dilate MODEL --scaling wd`, then `dqtool calibrate --scaling keep`, then this",
    )


def scheduler_of(calibrated: Manifest) -> ForeignConfig:
    """Return the config of the scheduler that a model was calibrated with."""
    return {} if calibrated.sampling is None else calibrated.sampling.scheduler


def fingerprint_parameters(options: DistillOptions) -> dict[str, Json]:
    """Return all parameters that decide the result, with defaults filled in."""
    chosen: dict[str, Json] = {} if options.blocks is None else {"blocks": options.blocks}
    if options.preset != STANDARD:
        chosen["preset"] = options.preset
    if options.low_rank:
        chosen["low_rank"] = options.low_rank
    if options.train_samples is not None:
        chosen["train_samples"] = options.train_samples
    if options.low_memory:  # sums in another order
        chosen["low_memory"] = [LOW_MEMORY_BLOCK, LOW_MEMORY_NETWORK]
    if options.parallel_blocks:
        chosen["parallel_blocks"] = {"repair_iters": repair_iters_of(options)}
    if corrects_predictions(options):
        chosen |= {"correct_images": CORRECT_IMAGES, "correct_detail": True}
    return (
        chosen
        | teacher_parameters()
        | options.spec.to_json()
        | {
            "method": options.method,
            "seed": options.seed,
            "static": options.static,
            "recipe": asdict(method_and_options(options)[1]),
        }
    )


def network_batch_of(options: DistillOptions, together: int) -> int | None:
    """Return how many samples a whole network learns from at once (None: a batch), with `together` as in `produce`."""
    asked = LOW_MEMORY_NETWORK if options.low_memory else None
    if together >= TOGETHER:
        return asked
    least = max(1, together // 8)
    return least if asked is None else min(asked, least)


def check_samples(wanted: int | None, manifest: Manifest) -> None:
    """Refuse a number of training samples that leaves out steps, or that there are not."""
    counts = manifest.metrics.samples_per_step or []
    if wanted is not None and not len(counts) <= wanted <= sum(counts):
        raise UsageError(
            f"{wanted} samples to train on can't be drawn: there are {sum(counts)}, of {len(counts)} steps",
            where="--train-samples",
            fix=f"Give {len(counts)} to {sum(counts)}",
        )


def produce(
    calibrated: Artifact, options: DistillOptions, spec: QuantizationSpec, workspace: Workspace, together: int
) -> StageOutput:
    """Initialise, train and pack.

    At most `together` samples run at once while the inputs and outputs of a block are computed. If `together` is less than
    `TOGETHER`, an eighth of them run at once while a whole network learns.
    """
    import torch

    from dqtool.core.allocator import return_freed_memory
    from dqtool.core.cost import replayed_together, samples_together
    from dqtool.core.device import device_of, peak_bytes, restart_peak, to_cpu
    from dqtool.core.memory import MemoryMeter, resident
    from dqtool.models.networks.checked_artifacts import checked_tensors
    from dqtool.models.networks.loading import network_of
    from dqtool.models.networks.packed import layer_infos
    from dqtool.models.networks.recorded_graph import graph_of
    from dqtool.models.sampling.fitted import FITTED, fitted_with
    from dqtool.models.sampling.sampler import Sampler
    from dqtool.models.sampling.teacher_precision import POINTS, SAMPLES, settle
    from dqtool.nn.assignment import assign_bits, require_branches, with_branches
    from dqtool.nn.surgery import packed_state
    from dqtool.scaling.folding import fold_packed
    from dqtool.scaling.learning import learn_scaling
    from dqtool.scaling.records import with_folds, with_learned_scales
    from dqtool.stages.shared.artifact_models import split_dilated, student_of, teacher_of, trace_of
    from dqtool.training.data import DistillationTask, Trajectory
    from dqtool.training.prediction import correct_predictions

    workspace.stop_clock()
    method, recipe = method_and_options(options)
    manifest = calibrated.manifest
    family, config = network_of(manifest.network)
    with torch.device("meta"):
        family.build(config)  # this imports all modules that the networks below need
    return_freed_memory()
    level = resident()
    tensors = checked_tensors(calibrated)
    spec, choice = chosen_bits(calibrated, tensors, options, spec, workspace)
    start = time.perf_counter()
    plans = assign_bits(layer_infos(manifest.layers), spec, dilated=split_dilated(tensors)[1])
    plans = with_branches(plans, options.low_rank)
    require_branches(plans, options.low_rank)
    student = student_of(manifest, tensors, plans, options.static, workspace)
    shifts = learn_scaling(manifest, student)
    report.say(
        f"distill: quantizers of {len(plans)} layers set in {report.format_seconds(time.perf_counter() - start)}"
    )
    sampling = manifest.sampling
    assert sampling is not None
    trace = trace_of(manifest)
    replayed = replayed_together(sum(layer.macs for layer in manifest.layers), TOGETHER, device_of(student).type)
    task = DistillationTask(
        family=family,
        teacher=teacher_of(manifest, tensors),
        student=student,
        trace=trace,
        trajectory=training_points(Trajectory.from_tensors(tensors), options),
        sampler=Sampler.calibrated(family, config, sampling, 1.0 if sampling.guidance is None else sampling.guidance),
        seed=options.seed,
        store=workspace,
        graph=graph_of(manifest),
        only=chosen_blocks(trace, options.blocks),
        repair_iters=repair_iters_of(options),
        shifts=shifts,
        cache_bytes=0 if options.low_memory or together < TOGETHER else options.cache_memory << 20,
        replay_batch=min(together, LOW_MEMORY_BLOCK if options.low_memory else TOGETHER, replayed),
        network_batch=network_batch_of(options, together),
        sampled_together=samples_together(manifest.layers, SAMPLED_TOGETHER, device_of(student).type),
        strict=options.strict,
    )
    index, _ = task.trajectory.few_of_each_step(POINTS, SAMPLES)
    precision = settle(task.teacher, family, [task.trajectory.arguments(index)], "teacher")
    return_freed_memory()
    device = device_of(student)
    restart_peak(device)
    with MemoryMeter(level) as memory:
        workspace.restart_clock(lambda: memory.figures() | peak_bytes(device))
        trained = method.train(task, recipe, lambda what, n: report.progress(f"distill: {what}", n, "iteration"))
        task.merge_scaling()
        if corrects_predictions(options):
            if task.low_memory:  # it dropped the float network
                task = replace(task, teacher=teacher_of(manifest, tensors))
                settle(task.teacher, family, [task.trajectory.arguments(index)], "teacher")
            used = time.process_time()
            with report.progress("distill: predictions", len(task.trajectory.timesteps), "step") as progress:
                trained |= correct_predictions(task, config, CORRECT_IMAGES, progress)
            trained |= {FITTED: fitted_with(sampling), "correction_cpu_seconds": time.process_time() - used}
    if trained:
        seconds, processor = workspace.spent()
        trained |= {"training_seconds": seconds, "training_cpu_seconds": processor, **workspace.peaks()}
    state = to_cpu(packed_state(student))
    learned = {name: value for name, value in state.items() if name.endswith(".dilation")}
    folded = fold_packed(manifest, state)
    layers = [
        replace(
            record,
            bits=plan.bits.widths,
            dilated=plan.dilated and plan.info.name not in folded,
            low_rank=plan.low_rank,
        )
        for record, plan in zip(manifest.layers, plans, strict=True)
    ]
    layers = with_folds(with_learned_scales(layers, tensors, learned), folded)
    if task.warnings:
        trained |= {"warnings": task.warnings}
    metrics = {**manifest.metrics.to_json(), **trained, **precision, **choice}
    return StageOutput(
        state,
        manifest.network,
        manifest.pipeline,
        layers,
        metrics,
        attachments=calibrated.attachments(),
        earlier_seconds=workspace.earlier_seconds(),
    )


def network_spec(options: DistillOptions, calibrated: Manifest) -> QuantizationSpec:
    """Return the bits that were asked for, with the layers that the preset leaves in float in this artifact's network."""
    if options.spec.preset != NONSTANDARD:
        return options.spec  # without importing torch: the artifact may be cached
    from dqtool.models.networks.packed import layer_infos
    from dqtool.models.networks.recorded_graph import graph_of
    from dqtool.nn.assignment import apply_preset

    return apply_preset(options.spec, layer_infos(calibrated.layers), lambda: graph_of(calibrated).roles)


def training_points(trajectory: Trajectory, options: DistillOptions) -> Trajectory:
    """Return all recorded points, or as many as `--train-samples` says."""
    return trajectory if options.train_samples is None else trajectory.subset(options.train_samples, options.seed)


def chosen_blocks(trace: Trace, pattern: str | None) -> list[str] | None:
    """Return the names of the blocks to train: those whose whole name `--blocks` matches; None for all.

    Raises:
        UsageError: it matches none.
    """
    if pattern is None:
        return None
    names = [block.name for block in trace.blocks]
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise UsageError(
            f"'{pattern}' matches no block", where="--blocks", fix=f"Blocks are named like {', '.join(names[:3])}"
        )
    return found

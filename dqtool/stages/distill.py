"""`dqtool distill`: choose the bits, initialise the quantizers, train them with the weights, pack the result."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, Workspace
from dqtool.core.quantization import QuantizationSpec
from dqtool.errors import UsageError
from dqtool.stages.running import Common, Product, check_steps, execute, input_artifact
from dqtool.training.methods import Method, method_of, resolve
from dqtool.training.options import EXTRAPOLATING

if TYPE_CHECKING:
    from dqtool.artifacts import Manifest
    from dqtool.graph.trace import Trace
    from dqtool.training.data import Trajectory

__all__ = ["DistillOptions", "corrects", "distill", "scheduler_of", "settled"]

CODE_VERSION = 3

CORRECT_IMAGES = 64
"""With `--correct-noise`, how many images the prediction tables are fitted on."""

LOW_MEMORY_BLOCK, LOW_MEMORY_NETWORK = 40, 8
"""With `--low-memory`, how many samples run together where a block's inputs and outputs are computed, and where a whole
network learns or samples."""


@dataclass(frozen=True)
class DistillOptions:
    """Options of `dqtool distill`. `iters` per block, or of the network where a method trains it whole; `refine_iters` for
    the pass over all blocks; None: the method's defaults. `train_samples`: points of the trajectory to train on.
    `cache_memory`: MiB that cached activations may take before they go to disk; it changes nothing in the result.
    `low_memory`: all of them go there, and few samples run together. `correct_noise`: whether predictions are corrected at
    each step; None: where the method says so and something was trained. `strict`: a training that diverges is an error; otherwise
    its block stays as calibrated, and the manifest's metric `warnings` says so. See also `settled`."""

    artifact: str | None = None
    output: str = "distilled.safetensors"
    bits: str = "4/4"
    steps: int | None = None
    iters: int | None = None
    refine_iters: int | None = None
    method: str = "bkd"
    seed: int = 0
    keep: tuple[str, ...] = ()
    softmax_bits: int = 8
    static: bool = False
    batch_size: int | None = None
    blocks: str | None = None
    preset: str = "standard"
    train_samples: int | None = None
    cache_memory: int = 6144
    low_memory: bool = False
    correct_noise: bool | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Refuse, before anything runs, what no artifact could make right.

        Raises:
            UsageError: bits, `--keep` patterns, a method or a preset that don't exist, or options that contradict each
                other.
        """
        _ = self.spec
        method, _ = method_and_options(self)
        if self.blocks is not None and not method.by_blocks:
            raise UsageError(
                f"--method {method.name} trains the network as a whole", where="--blocks", fix="Leave it out"
            )
        if self.correct_noise and self.static:
            raise UsageError(
                "--static leaves one quantizer for all steps, and the correction is one of each step",
                where="--correct-noise",
                fix="Leave one of the two out",
            )
        try:
            re.compile(self.blocks or "")
        except re.error as e:
            raise UsageError(f"'{self.blocks}' is no regular expression: {e}", where="--blocks") from e

    @cached_property
    def spec(self) -> QuantizationSpec:
        """`bits`, `keep`, `softmax_bits` and `preset`, parsed."""
        return QuantizationSpec.parse(self.bits, self.keep, self.softmax_bits, self.preset)


def distill(options: DistillOptions, common: Common) -> str:
    """Make the quantized artifact; returns its path as given.

    Raises:
        UsageError: a `--keep` pattern that matches no layer, or more training samples than there are.
        ArtifactError: the input is not calibrated, or was for another number of steps.
        NumericError: training diverged.
    """
    calibrated = input_artifact(options.artifact, ["calibrate"], "calibrate")
    check_steps(calibrated, options.steps)
    calm = settled(options, str(scheduler_of(calibrated.manifest).get("_class_name")))
    if calm != options:
        report.say(
            "distill: this sampler extrapolates from several predictions: without second pass and correction of predictions"
            ", where --refine-iters or --correct-noise don't ask for them"
        )
    options = calm
    check_samples(options.train_samples, calibrated.manifest)
    spec = network_spec(options, calibrated.manifest)
    parameters = resolved(options) | spec.to_json()
    inputs = [{"name": calibrated.given, "sha256": calibrated.sha256, "stage": calibrated.stage}]

    def work(key: str) -> Product:
        return produce(calibrated, options, spec, Workspace(options.output, key, forced=common.force))

    execute("distill", CODE_VERSION, options.output, parameters, inputs, common, work)
    return options.output


def scheduler_of(calibrated: Manifest) -> Mapping[str, Any]:
    """Config of the scheduler that a model was calibrated with."""
    return ((calibrated.pipeline or {}).get("sampling") or {}).get("scheduler") or {}


def settled(options: DistillOptions, scheduler: str) -> DistillOptions:
    """With the defaults that hold for a scheduler of this class: where it is `EXTRAPOLATING`, our methods leave out the second
    pass and don't correct predictions, unless they were asked to."""
    method = method_of(options.method)
    if scheduler not in EXTRAPOLATING or not method.corrects:
        return options
    passes = options.refine_iters
    if passes is None and any(field.name == "refine_iters" for field in fields(method.options)):
        passes = 0
    return replace(options, refine_iters=passes, correct_noise=bool(options.correct_noise))


def method_and_options(options: DistillOptions) -> tuple[Method, Any]:
    """The training method and its options, with defaults filled in.

    Raises:
        UsageError: there is no such method, or something was given that it has no use for.
    """
    method = method_of(options.method)
    given = {"iters": options.iters, "refine_iters": options.refine_iters, "batch_size": options.batch_size}
    return method, resolve(method, given)


def corrects(options: DistillOptions) -> bool:
    """Whether the network's predictions will be corrected at each step. Of options that are `settled`."""
    if options.correct_noise is not None:
        return options.correct_noise
    method, recipe = method_and_options(options)
    trains = any(getattr(recipe, name, 0) for name in ("iters", "refine_iters"))
    return method.corrects and trains and not options.static


def resolved(options: DistillOptions) -> dict[str, Any]:
    """All parameters that decide the result, with defaults filled in."""
    chosen: dict[str, Any] = {} if options.blocks is None else {"blocks": options.blocks}
    if options.preset != "standard":
        chosen["preset"] = options.preset
    if options.train_samples is not None:
        chosen["train_samples"] = options.train_samples
    if options.low_memory:  # sums in another order
        chosen["low_memory"] = [LOW_MEMORY_BLOCK, LOW_MEMORY_NETWORK]
    if corrects(options):
        chosen |= {"correct_images": CORRECT_IMAGES, "correct_detail": True}
    return (
        chosen
        | options.spec.to_json()
        | {
            "method": options.method,
            "seed": options.seed,
            "static": options.static,
            "recipe": asdict(method_and_options(options)[1]),
        }
    )


def check_samples(wanted: int | None, manifest: Manifest) -> None:
    """Refuse a number of training samples that leaves out steps, or that there are not."""
    counts = manifest.metrics["samples_per_step"]
    if wanted is not None and not len(counts) <= wanted <= sum(counts):
        raise UsageError(
            f"{wanted} samples to train on can't be drawn: there are {sum(counts)}, of {len(counts)} steps",
            where="--train-samples",
            fix=f"Give {len(counts)} to {sum(counts)}",
        )


def produce(calibrated: Artifact, options: DistillOptions, spec: QuantizationSpec, workspace: Workspace) -> Product:
    """Initialise, train, pack."""
    import torch

    from dqtool.core.allocator import return_freed_memory
    from dqtool.core.device import device_of, main_memory, peak_bytes, restart_peak
    from dqtool.core.memory import MemoryMeter, resident
    from dqtool.models.loading import network_of
    from dqtool.models.packed import layer_infos
    from dqtool.models.sampling import Sampler
    from dqtool.models.structure import graph_of
    from dqtool.nn.assignment import assign_bits
    from dqtool.nn.surgery import packed_state
    from dqtool.scaling.folding import fold_packed
    from dqtool.scaling.learning import learn_scaling
    from dqtool.scaling.records import with_folds, with_learned_scales
    from dqtool.stages.artifact_models import split_dilated, student_of, teacher_of, trace_of
    from dqtool.training.data import Problem, Trajectory
    from dqtool.training.prediction import correct_predictions

    method, recipe = method_and_options(options)
    manifest = calibrated.manifest
    family, config = network_of(manifest.model)
    with torch.device("meta"):
        family.build(config)  # which imports all that the networks below need
    return_freed_memory()
    level = resident()
    tensors = calibrated.tensors()
    start = time.perf_counter()
    plans = assign_bits(layer_infos(manifest.layers), spec, dilated=split_dilated(tensors)[1])
    student = student_of(manifest, tensors, plans, options.static)
    shifts = learn_scaling(manifest, student)
    report.say(
        f"distill: quantizers of {len(plans)} layers set in {report.format_seconds(time.perf_counter() - start)}"
    )
    assert manifest.pipeline is not None
    sampling = manifest.pipeline["sampling"]
    trace = trace_of(manifest)
    problem = Problem(
        family=family,
        teacher=teacher_of(manifest, tensors),
        student=student,
        trace=trace,
        trajectory=training_points(Trajectory.of(tensors), options),
        sampler=Sampler.calibrated(family, config, sampling, sampling.get("guidance", 1.0)),
        seed=options.seed,
        store=workspace,
        graph=graph_of(manifest),
        only=chosen_blocks(trace, options.blocks),
        shifts=shifts,
        cache_bytes=0 if options.low_memory else options.cache_memory << 20,
        replay_batch=LOW_MEMORY_BLOCK if options.low_memory else Problem.replay_batch,
        network_batch=LOW_MEMORY_NETWORK if options.low_memory else Problem.network_batch,
        strict=options.strict,
    )
    return_freed_memory()
    device = device_of(student)
    restart_peak(device)
    with MemoryMeter(level) as memory:
        workspace.restart_clock(lambda: memory.figures() | peak_bytes(device))
        trained = method.train(problem, recipe, lambda what, n: report.progress(f"distill: {what}", n, "iteration"))
        problem.merge_scaling()
        if corrects(options):
            if problem.short_of_memory:  # which let go of the float network
                problem = replace(problem, teacher=teacher_of(manifest, tensors))
            with report.progress("distill: predictions", len(problem.trajectory.timesteps), "step") as progress:
                trained |= correct_predictions(problem, config, CORRECT_IMAGES, progress)
    if trained:
        seconds, processor = workspace.spent()
        trained |= {"training_seconds": seconds, "training_cpu_seconds": processor, **workspace.peaks()}
    state = main_memory(packed_state(student))
    learned = {name: value for name, value in state.items() if name.endswith(".dilation")}
    folded = fold_packed(manifest, state)
    layers = [
        record | {"bits": plan.bits.to_json(), "dilated": plan.dilated and plan.info.name not in folded}
        for record, plan in zip(manifest.layers, plans, strict=True)
    ]
    layers = with_folds(with_learned_scales(layers, tensors, learned), folded)
    if problem.warnings:
        trained |= {"warnings": problem.warnings}
    metrics = {**manifest.metrics, **trained}
    return Product(
        state,
        manifest.model,
        manifest.pipeline,
        layers,
        metrics,
        attachments=calibrated.attachments(),
        earlier_seconds=workspace.earlier_seconds(),
    )


def network_spec(options: DistillOptions, calibrated: Manifest) -> QuantizationSpec:
    """Return the bits that were asked for, with the layers that the preset leaves in float in this artifact's network."""
    if options.spec.preset == "standard":
        return options.spec  # without importing torch: the artifact may be cached
    from dqtool.models.packed import layer_infos
    from dqtool.models.structure import graph_of
    from dqtool.nn.assignment import apply_preset

    return apply_preset(options.spec, layer_infos(calibrated.layers), lambda: graph_of(calibrated).roles)


def training_points(trajectory: Trajectory, options: DistillOptions) -> Trajectory:
    """All points that were recorded, or as many as `--train-samples` says."""
    return trajectory if options.train_samples is None else trajectory.subset(options.train_samples, options.seed)


def chosen_blocks(trace: Trace, pattern: str | None) -> list[str] | None:
    """Names of the blocks that are trained: those which `--blocks` matches as a whole; None for all.

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

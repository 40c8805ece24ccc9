"""`dqtool calibrate`: sample the full-precision model once and keep what any bit-width needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from dqtool import distributed, report
from dqtool.artifacts import Artifact, Checkpoints, Manifest, Workspace
from dqtool.artifacts.jsonvalues import ForeignConfig, Json
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.records import PipelineRecord, SamplingRecord
from dqtool.core.cost import samples_together
from dqtool.core.device import chosen_device, teacher_parameters
from dqtool.core.out_of_memory import with_smaller_batches
from dqtool.errors import UsageError
from dqtool.metrics.prompts import read_prompts
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.sampling.schedules import finite_config
from dqtool.stages.calibration.reuse import check_reusable, produce_reused, reused_parameters, statistics_of
from dqtool.stages.options.calibrate import (
    AUTO,
    KEEP,
    STEPS,
    STRATIFIED,
    CalibrateOptions,
    schedule_of,
    with_steps,
)
from dqtool.stages.shared.paths import read_paths
from dqtool.stages.shared.running import RunSettings, StageOutput, input_artifact, run_unless_cached

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dqtool.models.families import Family
    from dqtool.scaling.rescaling import Rescaled
    from dqtool.training.data import Trajectory

__all__ = ["CalibrateOptions", "calibrate"]

CODE_VERSION = 2

RANGE = ".channel_range"
SCALING_VERSIONS = {AUTO: 2}
"""Methods whose results have changed: artifacts of an older version are made again."""
SCALING_STEPS, SCALING_POINTS = 8, 2
"""Denoising steps, and trajectory points of each, whose layer inputs are seen by scalings that compare outputs."""


def calibrate(options: CalibrateOptions, settings: RunSettings) -> str:
    """Record the trajectory, choose the layers' factors by activations, and record the statistics of every quantizer at
    every step; returns the output's path as given.

    Raises:
        UsageError: fewer samples than steps, no conditions, or guidance or prompts for a model that knows none.
        NumericError: the model's own samples are not finite, or the scaled network's output is not the original's.
    """
    if options.statistics is not None:
        return _take_over(options, settings)
    if options.steps is not None or options.timesteps is not None:
        options = with_steps(options, None)
        check_samples(options)
    dilated = input_artifact(options.artifact, ["dilate"], "dilate")
    options = with_steps(options, (dilated.manifest.pipeline or PipelineRecord()).scheduler)
    check_samples(options)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    parameters = fingerprint_parameters(options, prompts)
    inputs = [dilated.as_input()]

    def work(key: str) -> StageOutput:
        workspace = Workspace(options.output, key, forced=settings.force)
        return with_smaller_batches(
            lambda size: produce(dilated, replace(options, batch_size=size), workspace, prompts),
            options.batch_size,
            "calibrate",
        )

    cached = run_unless_cached(
        "calibrate", CODE_VERSION, options.output, parameters, inputs, settings, work, reads=read_paths(options)
    )
    if settings.dry_run and not cached:
        _check_conditions(dilated, options)
    return options.output


def _take_over(options: CalibrateOptions, settings: RunSettings) -> str:
    """Take the calibration of another model over; returns the output's path as given."""
    calibrated = statistics_of(options)
    dilated = input_artifact(options.artifact, ["dilate"], "dilate")
    check_reusable(dilated, calibrated)
    run_unless_cached(
        "calibrate",
        CODE_VERSION,
        options.output,
        reused_parameters(calibrated),
        [dilated.as_input(), calibrated.as_input()],
        settings,
        lambda _key: produce_reused(dilated, calibrated),
        reads=read_paths(options),
    )
    return options.output


def _check_conditions(dilated: Artifact, options: CalibrateOptions) -> None:
    """Raise `UsageError` where nothing makes the conditions that the network takes."""
    from dqtool.models.components.companions import companions_of_artifact
    from dqtool.models.networks.loading import network_of

    family, config = network_of(dilated.manifest.network)
    ConditionSource.of(options).check_there(family, config, companions_of_artifact(dilated))


def check_samples(options: CalibrateOptions) -> None:
    """Raise `UsageError` for fewer samples than steps."""
    assert options.steps is not None
    if options.samples < options.steps:
        raise UsageError(
            f"{options.samples} samples can't cover {options.steps} steps",
            where="--samples",
            fix="Give at least one sample per step; 50 and more a step is usual",
        )


def fingerprint_parameters(options: CalibrateOptions, prompts: Sequence[str] | None = None) -> dict[str, Json]:
    """Return all parameters that decide the result; `prompts` are those of the options' file (None: it is read)."""
    if prompts is None and options.prompts is not None:
        prompts = read_prompts(options.prompts)
    parameters: dict[str, Json] = {
        "steps": options.steps or STEPS,
        "sampler": options.sampler,
        "samples": options.samples,
        "seed": options.seed,
        "eta": options.eta,
        "batch_size": options.batch_size,
    }
    if options.guidance is not None:
        parameters["guidance"] = options.guidance
    if options.image_guidance is not None:
        parameters["image_guidance"] = options.image_guidance
    if options.draw != STRATIFIED:
        parameters["draw"] = options.draw
    if options.scaling != KEEP:
        parameters["scaling"] = options.scaling
        if options.scaling in SCALING_VERSIONS:
            parameters["scaling_version"] = SCALING_VERSIONS[options.scaling]
        if options.scaling != "none":
            parameters["bits"] = options.bits
    if prompts is not None:
        parameters["prompts"] = hashlib.sha256(canonical_json(prompts).encode()).hexdigest()
    chosen = {
        "spacing": options.spacing,
        "timesteps": options.timesteps,
        "clip": options.clip,
        "variance": options.variance,
    }
    parameters |= {key: value for key, value in chosen.items() if value is not None}
    parameters |= teacher_parameters()
    return parameters | ConditionSource.of(options).parameters()


def produce(
    dilated: Artifact, options: CalibrateOptions, workspace: Workspace, prompts: Sequence[str] | None = None
) -> StageOutput:
    """Sample, draw and count. Save finished parts to `workspace` from time to time."""
    import torch

    from dqtool.models.components.companions import companions_of_artifact
    from dqtool.models.conditions.conditioning import Request
    from dqtool.models.networks.checked_artifacts import checked_tensors
    from dqtool.models.networks.loading import network_of
    from dqtool.models.networks.packed import layer_infos
    from dqtool.models.sampling.sampler import CALIBRATION, Sampler, initial_noise, make_sampler
    from dqtool.models.sampling.teacher_precision import SAMPLES, settle, sure_points
    from dqtool.nn.statistics import collect
    from dqtool.stages.calibration.trajectory import STATISTICS_SAMPLES, TrajectoryRecorder
    from dqtool.stages.shared.artifact_models import conditions_of, split_dilated, teacher_of
    from dqtool.stages.shared.folder_images import encoded_images
    from dqtool.training.data import Trajectory

    manifest = dilated.manifest
    family, config = network_of(manifest.network)
    tensors = checked_tensors(dilated)
    assert options.steps is not None
    choices = schedule_of(options)
    pipeline = manifest.pipeline or PipelineRecord()
    scheduler = make_sampler(pipeline.scheduler or family.scheduler, options.sampler, choices)
    check_variance(scheduler.config, config)
    images = -(-options.samples // options.steps)
    source = ConditionSource.of(options)
    conditions = conditions_of(dilated, Request(images, options.seed, options.guidance, prompts), source)
    network = teacher_of(manifest, tensors)
    listed = choices.listed(scheduler, options.steps)
    named = source.images is None or bool(family.condition_channels(config))
    asked = bool(conditions.table)  # guidance 1 counts too: the model's card may say another
    sampling = SamplingRecord(
        {**finite_config(scheduler.config), "_class_name": type(scheduler).__name__},
        options.steps,
        options.eta,
        options.sampler,
        guidance=conditions.guidance if asked else None,
        embedded_guidance=conditions.embedded if asked else None,
        image_guidance=_image_guidance(options, family, config) if conditions.guided else None,
        timesteps=None if listed is None else list(listed),
        spacing=None if listed is None else options.spacing,
        conditions=source.record() if asked and named and (conditions.random or not source.random) else None,
    )
    sampler = Sampler.calibrated(family, config, sampling, conditions.guidance)
    timesteps = sampler.timesteps()
    shape = family.sample_shape(config)
    generator = torch.Generator().manual_seed(options.seed)
    blocks = [block.name for block in manifest.metrics.blocks or ()]
    starts = None
    if source.images is not None and not family.condition_channels(config):
        starts = encoded_images(source.images, shape, companions_of_artifact(dilated)).starts()
    few_images = min(SAMPLES, images)
    noise = initial_noise(shape, range(few_images), options.seed, CALIBRATION)
    precision = settle(network, family, sure_points(timesteps, noise, conditions.given(0, few_images)), "trajectory")
    recorder = TrajectoryRecorder(network, shape, sampler, timesteps, options, generator, starts)
    quotas = recorder.quotas(conditions, blocks)
    conditions = conditions.evenly(recorder.images(quotas, conditions))
    together = samples_together(manifest.layers, 4 * options.batch_size, chosen_device().type)
    few = replace(recorder, options=replace(options, batch_size=min(options.batch_size, together)))
    trajectory, seen = few.record(conditions, quotas, workspace)
    points = Trajectory.from_tensors({**seen, "timesteps": timesteps})

    def per_step(what: str, kept: Checkpoints, runs: int = 1) -> Iterator[Callable[[], None]]:
        """Yield a function for each step that runs the network over the step's samples; it is called `runs` times, or not at
        all where an earlier run had recorded the step in `kept`."""
        mine = [(points.rows == step).nonzero()[:STATISTICS_SAMPLES, 0] for step in range(len(timesteps))]
        with report.progress(f"calibrate: {what}", runs * sum(map(len, mine)), "sample") as progress:
            for step, timestep in enumerate(timesteps):

                def run(chosen: torch.Tensor = mine[step], timestep: torch.Tensor = timestep) -> None:
                    for part in chosen.split(together):
                        family.predict(network, points.x[part], timestep, points.conditions_of(part))
                        progress.advance(
                            min(len(part) * distributed.world_size(), (progress.total or 0) - progress.done)
                        )

                if step in kept.found:
                    progress.skip(runs * len(mine[step]))
                yield run

    everything, records, metrics = dict(tensors), manifest.layers, manifest.metrics.to_json() | precision
    shifts: dict[str, torch.Tensor] = {}
    if options.scaling != KEEP:
        rescaled = rescaled_by(options, manifest, tensors, network, points, per_step, workspace)
        everything, records, shifts = rescaled.tensors, rescaled.records, rescaled.shifts
        metrics |= rescaled.metrics
        if shifts:
            network = teacher_of(manifest, everything)  # its layers read the shifted inputs
    _, dilation = split_dilated(everything)
    kept = Checkpoints(workspace, "statistics")
    statistics = collect(network, layer_infos(records), dilation, per_step("statistics", kept, 2), kept)
    ratios = range_ratios(statistics, dilation)
    for name in shifts.keys() & {name.removesuffix(RANGE) for name in statistics}:
        statistics[name + RANGE] += shifts[name]  # the ranges of the inputs as the model makes them
    ratio = sum(ratios.values()) / len(ratios) if ratios else 1.0
    metrics |= {
        "activation_range_ratio": ratio,
        "activation_range_ratios": ratios,
        "samples_per_step": quotas.tolist(),
    }
    report.say(f"activation range after dilation: {ratio:.3f} of that before (layer mean)")
    everything |= trajectory | statistics | {"timesteps": timesteps}
    pipeline = replace(pipeline, sampling=sampling)
    return StageOutput(everything, manifest.network, pipeline, records, metrics, attachments=dilated.attachments())


def _image_guidance(options: CalibrateOptions, family: Family, config: ForeignConfig) -> float | None:
    """Return the weight of guidance towards an image, None for none.

    Raises:
        UsageError: one is given, and the network takes no image beside its latents.
    """
    given, default = options.image_guidance, family.default_image_guidance(config)
    if given and not family.condition_channels(config):
        raise UsageError("This network takes no image", where="--image-guidance", fix="Leave it out")
    return default if given is None else given or None


def rescaled_by(
    options: CalibrateOptions,
    manifest: Manifest,
    tensors: Mapping[str, Tensor],
    network: nn.Module,
    points: Trajectory,
    per_step: Callable[[str, Checkpoints], Iterable[Callable[[], None]]],
    workspace: Workspace,
) -> Rescaled:
    """Return the dilated artifact with the factors of `--scaling`; `network` is the float one, without factors."""
    from dqtool.models.networks.loading import network_of
    from dqtool.models.networks.packed import layer_infos
    from dqtool.nn.statistics import channel_ranges
    from dqtool.scaling.choosing import Activations
    from dqtool.scaling.methods import scaling_method
    from dqtool.scaling.rescaling import rescale_network

    family, _ = network_of(manifest.network)
    method = scaling_method(options.scaling)
    ranges: dict[str, Tensor] = {}
    if method.needs_statistics:
        kept = Checkpoints(workspace, "channel ranges")
        found = channel_ranges(network, layer_infos(manifest.layers), per_step("ranges of channels", kept), kept)
        ranges = {name.removesuffix(RANGE): span for name, span in found.items()}
    # All of them run at once: few, where memory ran out with more.
    steps = min(SCALING_STEPS, options.batch_size)
    index, counts = points.few_of_each_step(steps, min(SCALING_POINTS, options.batch_size // steps))
    activations = Activations(ranges, lambda: family.predict(network, *points.arguments(index)), counts)
    return rescale_network(manifest, tensors, network, method, options.layer_bits, activations)


def check_variance(scheduler: ForeignConfig, network: ForeignConfig) -> None:
    """Raise `UsageError` for a scheduler that takes a learned variance from a network that predicts none."""
    if str(scheduler.get("variance_type")).startswith("learned"):
        channels = network.get("in_channels"), network.get("out_channels")
        if channels[0] is not None and channels[1] != 2 * channels[0]:
            raise UsageError(
                f"This network predicts no variance: {channels[1]} channels of {channels[0]}",
                where="--variance learned_range",
                fix="Choose fixed_small or fixed_large, or leave it out",
            )


def range_ratios(statistics: dict[str, Tensor], dilation: dict[str, Tensor]) -> dict[str, float]:
    """Return, for each dilated layer, its input range after the division by s relative to the one before (Table 13)."""
    ratios = {}
    for name, scale in dilation.items():
        span = statistics.get(f"{name}.channel_range")
        if span is not None:
            before = float(span[1].max().clamp(min=0) - span[0].min().clamp(max=0))
            divided = span / scale
            after = float(divided[1].max().clamp(min=0) - divided[0].min().clamp(max=0))
            ratios[name] = after / before if before else 1.0
    return ratios

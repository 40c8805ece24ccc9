"""`dqtool calibrate`: sample the full-precision model once and keep what any bit-width needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.artifacts.manifest import canonical_json
from dqtool.errors import NumericError, UsageError
from dqtool.metrics.prompts import read_prompts
from dqtool.models.sources import finite_config
from dqtool.stages.running import Common, Product, execute, input_artifact

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dqtool.models.conditioning import Conditions
    from dqtool.models.families import Family
    from dqtool.models.sampling import Sampler

__all__ = ["CalibrateOptions", "calibrate"]

CODE_VERSION = 1
STATISTICS_SAMPLES = 64
"""Samples of a step that its histograms are made of: each brings thousands of values per layer, more change nothing."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Options of `dqtool calibrate`. `samples` counts (x_t, t) pairs, spread evenly over the steps."""

    artifact: str | None = None
    output: str = "calibrated.safetensors"
    steps: int = 20
    sampler: str | None = None
    samples: int = 5120
    seed: int = 0
    eta: float = 0.0
    guidance: float | None = None
    prompts: str | None = None
    batch_size: int = 64


def calibrate(options: CalibrateOptions, common: Common) -> str:
    """Record the trajectory and the statistics of every quantizer at every step; returns the output's path as given.

    Raises:
        UsageError: fewer samples than steps, or guidance or prompts for a model that knows none.
        NumericError: the model's own samples are not finite.
    """
    if options.samples < options.steps:
        raise UsageError(
            f"{options.samples} samples can't cover {options.steps} steps",
            where="--samples",
            fix="Give at least one sample per step; 50 and more a step is usual",
        )
    dilated = input_artifact(options.artifact, ["dilate"], "dilate")
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    parameters: dict[str, Any] = {
        "steps": options.steps,
        "sampler": options.sampler,
        "samples": options.samples,
        "seed": options.seed,
        "eta": options.eta,
        "batch_size": options.batch_size,
    }
    if options.guidance is not None:
        parameters["guidance"] = options.guidance
    if prompts is not None:
        parameters["prompts"] = hashlib.sha256(canonical_json(prompts).encode()).hexdigest()
    inputs = [{"name": dilated.given, "sha256": dilated.sha256, "stage": dilated.stage}]
    execute(
        "calibrate",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        common,
        lambda _key: produce(dilated, options, prompts),
    )
    return options.output


def produce(dilated: Artifact, options: CalibrateOptions, prompts: Sequence[str] | None = None) -> Product:
    """Sample, draw, count."""
    import torch

    from dqtool.models.conditioning import Request
    from dqtool.models.loading import network_of
    from dqtool.models.packed import layer_infos
    from dqtool.models.sampling import Sampler, make_sampler
    from dqtool.nn.statistics import collect
    from dqtool.stages.artifact_models import conditions_of, split_dilated, teacher_of, trajectory_of

    manifest = dilated.manifest
    family, config = network_of(manifest.model)
    tensors = dilated.tensors()
    _, dilation = split_dilated(tensors)
    scheduler = make_sampler((manifest.pipeline or {}).get("scheduler") or family.scheduler, options.sampler)
    images = -(-options.samples // options.steps)
    conditions = conditions_of(dilated, Request(images, options.seed, options.guidance, prompts))
    network = teacher_of(manifest, tensors)
    sampler = Sampler(
        family, scheduler, options.steps, options.eta, guidance=conditions.guidance, tokens=family.tokens(config)
    )
    timesteps = sampler.timesteps()
    trajectory = record(network, family, config, sampler, timesteps, conditions, options)
    points = trajectory_of({**trajectory, "timesteps": timesteps})

    def per_step() -> Iterator[Callable[[], None]]:
        with report.progress("calibrate: statistics", len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                mine = (points.rows == step).nonzero()[:STATISTICS_SAMPLES, 0]

                def run(mine: torch.Tensor = mine, timestep: torch.Tensor = timestep) -> None:
                    for part in mine.split(options.batch_size * 4):
                        family.predict(network, points.x[part], timestep, points.given(part))

                yield run
                progress.advance()

    statistics = collect(network, layer_infos(manifest.layers), dilation, per_step())
    ratios = range_ratios(statistics, dilation)
    metrics = {
        "activation_range_ratio": sum(ratios.values()) / len(ratios) if ratios else 1.0,
        "activation_range_ratios": ratios,
        "samples_per_step": torch.bincount(points.rows, minlength=len(timesteps)).tolist(),
    }
    report.say(f"activation range after dilation: {metrics['activation_range_ratio']:.3f} of that before (layer mean)")
    pipeline = dict(manifest.pipeline or {})
    pipeline["sampling"] = {
        "sampler": options.sampler,
        "scheduler": finite_config(sampler.scheduler.config) | {"_class_name": type(sampler.scheduler).__name__},
        "steps": options.steps,
        "eta": options.eta,
    }
    if conditions.guided:
        pipeline["sampling"]["guidance"] = conditions.guidance
    everything = dict(tensors) | trajectory | statistics | {"timesteps": timesteps}
    metrics = {**manifest.metrics, **metrics}
    return Product(everything, manifest.model, pipeline, manifest.layers, metrics, attachments=dilated.attachments())


def record(
    network: nn.Module,
    family: Family,
    config: dict[str, Any],
    sampler: Sampler,
    timesteps: Tensor,
    conditions: Conditions,
    options: CalibrateOptions,
) -> dict[str, Tensor]:
    """Draw `samples` points of the trajectory, evenly over the steps and at random within each; with guidance a point
    counts twice, for what the network is asked without and with the condition.

    Returns `trajectory.x` `[N, C, H, W]` and `trajectory.rows` `[N]` (row of the step in `timesteps`), ordered by step;
    for a conditional network one table `condition.NAME` `[K, ...]` a condition and `trajectory.subjects` `[N]`, the row
    of each sample in them.
    """
    import torch

    from dqtool.models.sampling import CALIBRATION

    generator = torch.Generator().manual_seed(options.seed)
    steps, halves = len(timesteps), 1 + conditions.guided
    images = -(-options.samples // (steps * halves))
    row_of = {float(t): i for i, t in enumerate(timesteps)}
    pools: list[list[Tensor]] = [[] for _ in range(steps)]
    owners: list[list[Tensor]] = [[] for _ in range(steps)]
    done = 0
    calls = -(-images // options.batch_size) * steps
    with report.progress("calibrate: trajectory", calls) as progress:

        def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
            row = row_of[float(timestep)]
            # [n, halves, ...]: a point's inputs beside each other.
            pools[row].append(torch.stack(x.chunk(halves), 1))
            owners[row].append(torch.arange(done, done + len(x) // halves))
            progress.advance()

        shape = family.sample_shape(config)
        for batch in sampler.batches(
            network,
            shape,
            images,
            options.seed,
            options.batch_size,
            conditions.given,
            see,
            CALIBRATION,
            conditions.null,
        ):
            done += len(batch)
            if not bool(torch.isfinite(batch).all()):
                raise NumericError(
                    "The full-precision model's own samples are not finite",
                    where="calibrate",
                    fix="Check the model's scheduler config and the sampler",
                )
    quotas = [options.samples // steps] * steps
    for row in torch.randperm(steps, generator=generator)[: options.samples % steps].tolist():
        quotas[row] += 1
    xs, rows, asked = [], [], []
    for row, quota in enumerate(quotas):
        pool = torch.cat(pools[row])
        chosen = torch.randperm(len(pool), generator=generator)[: -(-quota // halves)].sort().values
        xs.append(pool[chosen].flatten(0, 1)[:quota])
        subjects = conditions.rows(0, images)[torch.cat(owners[row])[chosen]]
        if conditions.guided:
            subjects = torch.stack([torch.full_like(subjects, len(conditions) - 1), subjects], 1).flatten()
        asked.append(subjects[:quota])
        rows.append(torch.full((quota,), row))
    found = {"trajectory.x": torch.cat(xs), "trajectory.rows": torch.cat(rows)}
    if conditions.table:
        found["trajectory.subjects"] = torch.cat(asked)
        found |= {f"condition.{name}": values for name, values in conditions.table.items()}
    return found


def range_ratios(statistics: dict[str, Tensor], dilation: dict[str, Tensor]) -> dict[str, float]:
    """Width of each dilated layer's input range after dividing by s, over that before (Table 13)."""
    ratios = {}
    for name, scale in dilation.items():
        span = statistics.get(f"{name}.channel_range")
        if span is not None:
            before = float(span[1].max().clamp(min=0) - span[0].min().clamp(max=0))
            divided = span / scale
            after = float(divided[1].max().clamp(min=0) - divided[0].min().clamp(max=0))
            ratios[name] = after / before if before else 1.0
    return ratios

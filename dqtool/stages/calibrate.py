"""`dqtool calibrate`: sample the full-precision model once and keep what any bit-width needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.errors import NumericError, UsageError
from dqtool.models.sources import finite_config
from dqtool.stages.running import Common, Product, execute, input_artifact

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

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
    batch_size: int = 64


def calibrate(options: CalibrateOptions, common: Common) -> str:
    """Record the trajectory and the statistics of every quantizer at every step; returns the output's path as given.

    Raises:
        UsageError: fewer samples than steps.
        NumericError: the model's own samples are not finite.
    """
    if options.samples < options.steps:
        raise UsageError(
            f"{options.samples} samples can't cover {options.steps} steps",
            where="--samples",
            fix="Give at least one sample per step; 50 and more a step is usual",
        )
    dilated = input_artifact(options.artifact, ["dilate"], "dilate")
    parameters = {
        "steps": options.steps,
        "sampler": options.sampler,
        "samples": options.samples,
        "seed": options.seed,
        "eta": options.eta,
        "batch_size": options.batch_size,
    }
    inputs = [{"name": dilated.given, "sha256": dilated.sha256, "stage": dilated.stage}]
    execute(
        "calibrate", CODE_VERSION, options.output, parameters, inputs, common, lambda _key: produce(dilated, options)
    )
    return options.output


def produce(dilated: Artifact, options: CalibrateOptions) -> Product:
    """Sample, draw, count."""
    import torch

    from dqtool.models.loading import network_of
    from dqtool.models.packed import layer_infos
    from dqtool.models.sampling import Sampler, make_sampler
    from dqtool.nn.statistics import collect
    from dqtool.stages.artifact_models import split_dilated, teacher_of

    manifest = dilated.manifest
    family, config = network_of(manifest.model)
    tensors = dilated.tensors()
    _, dilation = split_dilated(tensors)
    network = teacher_of(manifest, tensors)
    scheduler_config = None if manifest.pipeline is None else manifest.pipeline["scheduler"]
    sampler = Sampler(family, make_sampler(scheduler_config, options.sampler), options.steps, options.eta)
    timesteps = sampler.timesteps()
    trajectory = record(network, family, config, sampler, timesteps, options)
    rows, x = trajectory["trajectory.rows"], trajectory["trajectory.x"]
    conditions = {k.removeprefix("condition."): v for k, v in trajectory.items() if k.startswith("condition.")}

    def per_step() -> Iterator[Callable[[], None]]:
        with report.progress("calibrate: statistics", len(timesteps)) as progress:
            for step, timestep in enumerate(timesteps):
                mine = (rows == step).nonzero()[:STATISTICS_SAMPLES, 0]

                def run(mine: torch.Tensor = mine, timestep: torch.Tensor = timestep) -> None:
                    for part in mine.split(options.batch_size * 4):
                        family.predict(network, x[part], timestep, {k: v[part] for k, v in conditions.items()})

                yield run
                progress.advance()

    statistics = collect(network, layer_infos(manifest.layers), dilation, per_step())
    ratios = range_ratios(statistics, dilation)
    metrics = {
        "activation_range_ratio": sum(ratios.values()) / len(ratios) if ratios else 1.0,
        "activation_range_ratios": ratios,
        "samples_per_step": torch.bincount(rows, minlength=len(timesteps)).tolist(),
    }
    report.say(f"activation range after dilation: {metrics['activation_range_ratio']:.3f} of that before (layer mean)")
    pipeline = dict(manifest.pipeline or {})
    pipeline["sampling"] = {
        "sampler": options.sampler,
        "scheduler": finite_config(sampler.scheduler.config) | {"_class_name": type(sampler.scheduler).__name__},
        "steps": options.steps,
        "eta": options.eta,
    }
    everything = dict(tensors) | trajectory | statistics | {"timesteps": timesteps}
    return Product(everything, manifest.model, pipeline, manifest.layers, {**manifest.metrics, **metrics})


def record(
    network: nn.Module,
    family: Family,
    config: dict[str, Any],
    sampler: Sampler,
    timesteps: Tensor,
    options: CalibrateOptions,
) -> dict[str, Tensor]:
    """Draw `samples` points of the trajectory, evenly over the steps and at random within each.

    Returns `trajectory.x` `[N, C, H, W]`, `trajectory.rows` `[N]` (row of the step in `timesteps`) and one
    `condition.NAME` `[N, ...]` per condition, ordered by step.
    """
    import torch

    from dqtool.models.sampling import CALIBRATION

    generator = torch.Generator().manual_seed(options.seed)
    steps = len(timesteps)
    images = -(-options.samples // steps)
    row_of = {float(t): i for i, t in enumerate(timesteps)}
    pools: list[list[Tensor]] = [[] for _ in range(steps)]
    conditions = family.conditions(config, images, generator)
    owners: list[list[Tensor]] = [[] for _ in range(steps)]
    done = 0
    calls = -(-images // options.batch_size) * steps
    with report.progress("calibrate: trajectory", calls) as progress:

        def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
            row = row_of[float(timestep)]
            pools[row].append(x.clone())
            owners[row].append(torch.arange(done, done + len(x)))
            progress.advance()

        shape = family.sample_shape(config)
        for batch in sampler.batches(
            network,
            shape,
            images,
            options.seed,
            options.batch_size,
            lambda start, stop: {k: v[start:stop] for k, v in conditions.items()},
            see,
            CALIBRATION,
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
    xs, rows, chosen_owners = [], [], []
    for row, quota in enumerate(quotas):
        pool = torch.cat(pools[row])
        chosen = torch.randperm(len(pool), generator=generator)[:quota].sort().values
        xs.append(pool[chosen])
        chosen_owners.append(torch.cat(owners[row])[chosen])
        rows.append(torch.full((len(chosen),), row))
    owner = torch.cat(chosen_owners)
    return {
        "trajectory.x": torch.cat(xs),
        "trajectory.rows": torch.cat(rows),
        **{f"condition.{k}": v[owner] for k, v in conditions.items()},
    }


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

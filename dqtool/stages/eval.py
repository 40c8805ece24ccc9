"""`dqtool eval`: measure any artifact or exported directory against its full-precision reference."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from dqtool import distributed, report
from dqtool.artifacts import Artifact, Checkpoints, OutputKind, Workspace, read_manifest, sha256_file
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.records import EvalRecord, InputRecord
from dqtool.core.bits import bits_label
from dqtool.core.cost import samples_together
from dqtool.core.device import chosen_device, teacher_parameters
from dqtool.errors import UsageError
from dqtool.metrics import CLASSIFIERS, FIGURES, METRICS, value_of
from dqtool.metrics.prompts import read_prompts
from dqtool.models.components.companions import companions_of_artifact
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.sampling.fitted import AUTO
from dqtool.runtimes.names import runtime_name
from dqtool.stages.evaluation.correction import switch_correction
from dqtool.stages.evaluation.engines import requested_runtime, run_exported
from dqtool.stages.evaluation.figures import LAYERS_VERSION, cost_figures, image_figures, layer_errors
from dqtool.stages.evaluation.image_metrics import (
    choose_metrics,
    files_of,
    metric_figures,
    prepared_meter,
    save_samples,
)
from dqtool.stages.evaluation.noise import FIT_IMAGES, fit_correction, needs_reference, with_correction
from dqtool.stages.evaluation.reference import ExportedReference, Reference, find_reference, reference_network
from dqtool.stages.options.eval import DEFAULT_METRICS, EvalOptions
from dqtool.stages.shared.paths import model_places, read_paths
from dqtool.stages.shared.running import (
    RunSettings,
    StageOutput,
    check_steps,
    input_artifact,
    run_unless_cached,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.stages.evaluation.images import ImageMaker

__all__ = ["EvalOptions", "evaluate"]

CODE_VERSION = 4


def evaluate(options: EvalOptions, settings: RunSettings) -> str:
    """Sample, compare, write the report and return its path as given.

    Raises:
        UsageError: a metric is unknown or does not apply to this model; a runtime is given for an artifact before the export.
        ArtifactError: the artifact was not made from the reference.
        EnvironmentFault: a metric lacks the file it needs, or the noise correction lacks the reference.
    """
    artifact = input_artifact(options.artifact, ["dilate", "calibrate", "distill", "export"], "export")
    if artifact.stage in ("distill", "export"):
        check_steps(artifact, options.steps)
    options = replace(options, runtime=requested_runtime(artifact, options.runtime))
    metrics = chosen_metrics(options, artifact)
    reference = find_reference(options.reference, artifact)
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    parameters = fingerprint_parameters(options, metrics, prompts)
    if options.correct_noise:
        needs_reference(reference, artifact)
    inputs = [artifact.as_input()]
    if reference is not None:
        inputs.append(InputRecord(reference.given, reference.sha256()))
    also: list[tuple[str, OutputKind]] = [(options.grid, "picture")] if options.grid else []
    also += [(options.save_samples, "images")] if options.save_samples else []
    run_unless_cached(
        "eval",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        settings,
        lambda key: produce(
            artifact, reference, metrics, options, prompts, Workspace(options.output, key, forced=settings.force)
        ),
        kind="report",
        also=also,
        reads=[*read_paths(options), *model_places(reference)],
    )
    if not settings.dry_run:
        print_figures(artifact, read_manifest(options.output).evaluation)
    return options.output


def fingerprint_parameters(
    options: EvalOptions, metrics: Sequence[str], prompts: Sequence[str] | None = None
) -> dict[str, Json]:
    """Return all parameters that decide the figures; `prompts` are those of the options' file (None: it is read)."""
    files = files_of(options)
    if prompts is None and options.prompts is not None:
        prompts = read_prompts(options.prompts)
    parameters: dict[str, Json] = {
        "metrics": list(metrics),
        "samples": options.samples,
        "seed": options.seed,
        "steps": options.steps,
        "sampler": options.sampler,
        "batch_size": options.batch_size,
        "runtime": runtime_name(options.runtime),
        "grid": options.grid,
    }
    versions = {name: METRICS[name].version for name in metrics if name in METRICS and METRICS[name].version > 1}
    if "layers" in metrics:
        versions["layers"] = LAYERS_VERSION
    if versions:
        parameters["metric_versions"] = versions
    if added := {name: METRICS[name].added for name in metrics if name in METRICS and METRICS[name].added}:
        parameters["figures_added"] = added
    if files.given():
        parameters["files"] = files.describe()
    if options.image_size is not None:
        parameters["image_size"] = options.image_size
    if options.save_samples is not None:
        parameters["save_samples"] = options.save_samples
    if options.guidance is not None:
        parameters["guidance"] = options.guidance
    if prompts is not None:
        parameters["prompts"] = prompts
    if options.correct_noise:
        parameters["correct_noise"] = True
        if options.batch_size < FIT_IMAGES:  # these were fitted on one batch at first
            parameters["fit_images"] = FIT_IMAGES
    if options.correction != AUTO:
        parameters["correction"] = options.correction
    if options.floor:
        parameters["floor"] = True
    parameters |= teacher_parameters()
    return parameters | ConditionSource.of(options).parameters()


def chosen_metrics(options: EvalOptions, artifact: Artifact) -> tuple[str, ...]:
    """Return the metrics to compute. Raise `UsageError` for one that needs more samples."""
    chosen = applicable_metrics(options, artifact)
    for name in chosen:
        least = METRICS[name].least_samples if name in METRICS else 0
        if options.samples < least:
            raise UsageError(
                f"The metric '{name}' needs at least {least} samples, and {options.samples} are to be drawn",
                where="--samples",
                fix=f"Raise it to {least} or more, or leave {name} out of --metrics",
            )
    return chosen


def applicable_metrics(options: EvalOptions, artifact: Artifact) -> tuple[str, ...]:
    """Return the metrics that were asked for, else all that apply to the model."""
    shape = image_shape(artifact)
    own = [name for name in CLASSIFIERS if METRICS[name].reads(artifact.manifest.network.source)]
    companions = companions_of_artifact(artifact)
    texts = companions is not None and companions.encodes_text
    of_images = choose_metrics(options.metrics, files_of(options), prompts=texts or options.pipeline is not None)
    if options.metrics is None:
        return (*own, *DEFAULT_METRICS, *of_images)
    named = [name for name in CLASSIFIERS if name in options.metrics]
    if named and shape[0] != 1:
        raise UsageError(f"The metrics {', '.join(named)} read images of one channel", where="--metrics")
    return options.metrics


def image_shape(artifact: Artifact) -> tuple[int, ...]:
    """Return the shape `(C, H, W)` of the images that an artifact's model makes, from its configs and without torch."""
    config = artifact.manifest.network.config
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    companions = companions_of_artifact(artifact)
    shape: tuple[Any, ...] = (config.get("in_channels"), height, width)
    return shape if companions is None or size is None else companions.image_shape(shape)


def produce(
    artifact: Artifact,
    reference: Reference | None,
    metrics: tuple[str, ...],
    options: EvalOptions,
    prompts: Sequence[str] | None = None,
    workspace: Workspace | None = None,
) -> StageOutput:
    """Sample from both networks with the same seeds and compute every figure. Finished images go to `workspace`.

    Where several processes share the command, all sample and run the networks of metrics, and the main one computes the figures.
    """
    from dqtool.models.sampling.sampler import IMAGES, initial_noise
    from dqtool.models.sampling.teacher_precision import SAMPLES, settle, sure_points
    from dqtool.nn.surgery import missed_timesteps
    from dqtool.stages.evaluation.images import first_channels, maker_of_artifact, makes_latents

    manifest, main = artifact.manifest, distributed.is_main()
    together = samples_together(manifest.layers, options.batch_size, chosen_device().type)
    options = replace(options, batch_size=together)
    files = files_of(options)
    if makes_latents(artifact):
        check_needs_no_pixels(metrics, options)
    meter = prepared_meter([name for name in metrics if name in METRICS and METRICS[name].start is not None], files)
    source = ConditionSource.of(options, manifest.sampling, artifact.given)
    maker = maker_of_artifact(
        artifact, options.samples, options.seed, options.steps, options.sampler, options.guidance, prompts, source
    )
    network = network_of_artifact(artifact, options.runtime, options.batch_size)
    correction = switch_correction(network, artifact, maker, options.correction, "eval")
    float_network = None
    if reference is not None:
        float_network = reference_network(reference, manifest.network)
    figures: dict[str, Json] = {}
    of_reference: dict[str, Json] = {}
    if isinstance(reference, ExportedReference):
        figures["reference_is"] = f"{reference.given} in the simulate runtime"
    expected = None
    kept = None if workspace is None else partial(Checkpoints, workspace)
    needs_images = bool(set(METRICS) & set(metrics)) or bool(options.grid or options.save_samples)
    if needs_images:
        figures |= {} if correction is None else {"correction": correction}
        if float_network is not None and reference is not None:
            if not isinstance(reference, ExportedReference):
                few = min(SAMPLES, options.samples)
                noise = initial_noise(maker.shape, range(few), options.seed, IMAGES)
                points = sure_points(maker.sampler.timesteps(), noise, maker.conditions.given(0, few))
                figures |= settle(float_network, maker.sampler.family, points, "reference")
            expected = reference_images(float_network, reference, maker, options, kept)
        sampled = maker
        if options.correct_noise and float_network is not None:
            of_noise = fit_correction(network, float_network, maker, options.seed, options.batch_size)
            figures["noise_correction"] = {"images": FIT_IMAGES, "steps": of_noise.to_json()}
            sampled = with_correction(maker, of_noise)
        images = sampled.draw(network, options.samples, options.seed, options.batch_size, "eval: samples", kept)
        if artifact.stage == "export":
            figures["runtime"] = str(network.runtime)
        if main:
            figures |= image_figures(images, expected, metrics, maker.conditions.requested_digits(len(images)))
        if isinstance(known := figures.get("reference"), dict):
            of_reference = known
        distances = {name: METRICS[name].distance for name in CLASSIFIERS if name in metrics}
        if options.floor and distances and float_network is not None and reference is not None:
            assert expected is not None
            other = replace(options, seed=options.seed + 1)
            others = reference_images(float_network, reference, maker, other, kept, "eval: floor")
            for name, distance in distances.items() if main else ():
                assert distance is not None
                of_reference[f"fd.{name}_from_reference"] = distance(others, expected)
        if meter is not None:
            rows = maker.conditions.rows(0, options.samples).tolist()
            texts = [maker.conditions.names[row] for row in rows] if maker.conditions.names else None
            size = options.image_size
            if expected is not None:
                told = "eval: metrics of the reference"
                of_reference |= metric_figures(meter, expected, texts, size, told, of_reference=True)
            if of_reference:
                figures["reference"] = of_reference
            figures |= metric_figures(meter, images, texts, size, "eval: metrics")
            figures["files"] = files.describe()
        if main and options.save_samples is not None:
            about: dict[str, Json] = {"source": artifact.given, "seed": options.seed, "images": len(images)}
            save_samples(options.save_samples, images, options.image_size, about)
            figures["samples_file"] = {
                "file": os.path.basename(options.save_samples),
                "sha256": sha256_file(options.save_samples),
            }
        if (missed := missed_timesteps(network)) is not None:
            figures["missed_timesteps"] = list(missed)
        if main and options.grid is not None:
            from dqtool.metrics.grid import save_grid

            columns = (
                [("reference" if isinstance(reference, ExportedReference) else "full precision", expected)]
                if expected is not None
                else []
            )
            panels = [*columns, (bits_label(manifest.layers), images)]
            save_grid(first_channels(panels) if maker.latents else panels, options.grid)
            figures["grid"] = {"file": os.path.basename(options.grid), "sha256": sha256_file(options.grid)}
    if "cost" in metrics:
        figures["cost"] = cost_figures(artifact).to_json()
    if main and "layers" in metrics and float_network is not None and not isinstance(reference, ExportedReference):
        if options.runtime != "simulate":  # engines fuse layers, and leave their outputs nowhere to compare
            network = network_of_artifact(artifact, "simulate")
        with distributed.solo():
            figures["layer_errors"] = layer_errors(float_network, network, maker, options.seed)
    return StageOutput(None, manifest.network, manifest.pipeline, manifest.layers, figures)


def check_needs_no_pixels(metrics: Sequence[str], options: EvalOptions) -> None:
    """Raise `UsageError` for metrics and outputs that need images, of a model whose decoder is missing."""
    named = [name for name in metrics if name in METRICS and METRICS[name].start is not None]
    asked = [f"--metrics {','.join(named)}"] * bool(named) + ["--save-samples"] * (options.save_samples is not None)
    if asked:
        raise UsageError(
            "This model comes without its decoder: its samples are latents, and this needs images",
            where=" and ".join(asked),
            fix="Start from a pipeline that has its autoencoder, or ask for similarity, layers and cost alone",
        )


def network_of_artifact(artifact: Artifact, runtime: str, batch: int | None = None) -> nn.Module:
    """Return the network of an artifact of any stage, to run `batch` samples at a time."""
    from dqtool.core.device import place

    manifest = artifact.manifest
    if artifact.stage == "export":
        return run_exported(artifact.given, runtime, batch)
    from dqtool.models.networks.checked_artifacts import checked_tensors

    if artifact.stage == "distill":
        from dqtool.models.networks.packed import is_static, packed_network, plans_of
        from dqtool.models.networks.packed_checks import step_count

        state = checked_tensors(artifact)
        static = is_static(manifest, step_count(state))
        packed = packed_network(manifest.network.class_name, manifest.network.config, plans_of(manifest), state, static)
        return place(packed)
    from dqtool.stages.shared.artifact_models import teacher_of

    return teacher_of(manifest, checked_tensors(artifact))


def reference_images(
    network: nn.Module,
    reference: Reference,
    maker: ImageMaker,
    options: EvalOptions,
    kept: Callable[[str], Checkpoints] | None = None,
    what: str = "eval: reference",
) -> Tensor:
    """Return the full-precision model's images, from the cache when the same ones were made before.

    `what` names these images in progress lines and among the pieces of an interrupted run.
    """
    from dqtool.models.sampling.image_cache import cached_images
    from dqtool.models.sampling.sampler import IMAGES
    from dqtool.models.sampling.teacher_precision import precision_label

    sampler, conditions = maker.sampler, maker.conditions
    key = {
        "model": reference.sha256(),
        "scheduler": dict(sampler.scheduler.config),
        "class": type(sampler.scheduler).__name__,
        "steps": sampler.steps,
        "eta": sampler.eta,
        "samples": options.samples,
        "seed": options.seed,
        "noise": IMAGES,
        "batch_size": options.batch_size,
    }
    if conditions.table:
        key |= {"guidance": conditions.guidance, "names": conditions.names, "digest": conditions.digest()}
    if precision := precision_label(network):
        key["precision"] = precision
    return cached_images(
        key, lambda: maker.draw(network, options.samples, options.seed, options.batch_size, what, kept)
    )


def print_figures(artifact: Artifact, figures: EvalRecord) -> None:
    """Print the figures of an evaluated artifact as a table on standard error."""
    rows: list[tuple[str, ...]] = []
    for key, figure in FIGURES.items():
        value, full = value_of(figures.as_read, key), value_of(figures.reference, key)
        if value is not None and not key.endswith((".std", "_ratio")):
            rows.append((figure.label, figure.text(value), "" if full is None else figure.text(full)))
    cost = figures.cost
    if cost is not None:
        rows.append(("bytes", f"{cost.bytes:,}", f"{cost.bytes_float32:,}"))
        rows.append(("bit operations (G)", f"{cost.bops / 1e9:.2f}", f"{cost.bops_float32 / 1e9:.2f}"))
    label = bits_label(artifact.manifest.layers)
    count = "" if figures.samples is None else f", {figures.samples} images"
    count += "" if figures.runtime is None else f" by {figures.runtime}"
    report.table(
        f"{artifact.given}{count}",
        ["", label, "reference" if figures.reference_is is not None else "full precision"],
        rows,
    )
    worst = sorted(figures.layer_errors.items(), key=lambda item: -item[1])[:8]
    if worst:
        report.table("Layers with the largest error", ["layer", "|y'-y|²/|y|²"], [(n, f"{e:.4f}") for n, e in worst])

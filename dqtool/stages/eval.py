"""`dqtool eval`: measure any artifact or exported directory against its full-precision reference."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, read_manifest, sha256_file
from dqtool.errors import ArtifactError, DqtoolError, UsageError
from dqtool.models.sources import ModelSource, resolve_model
from dqtool.stages.running import Common, Product, check_steps, execute, input_artifact

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.models.sampling import Sampler

__all__ = ["METRICS", "EvalOptions", "evaluate"]

CODE_VERSION = 1
METRICS = ("digits", "similarity", "layers", "cost")
"""Groups of figures: digit scores; PSNR against the reference's samples of the same seeds; error per layer; size and BOPs."""
LAYER_SAMPLES = 256


@dataclass(frozen=True)
class EvalOptions:
    """Options of `dqtool eval`. `samples` counts images; `reference` defaults to the model the artifact was made from."""

    artifact: str | None = None
    output: str = "eval.json"
    reference: str | None = None
    metrics: tuple[str, ...] | None = None
    samples: int = 1024
    seed: int = 0
    steps: int | None = None
    sampler: str | None = None
    batch_size: int = 128
    runtime: str = "simulate"
    grid: str | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown metric."""
        for metric in self.metrics or ():
            if metric not in METRICS:
                raise UsageError(
                    f"unknown metric '{metric}'", where="--metrics", fix=f"Choose from {', '.join(METRICS)}"
                )


def evaluate(options: EvalOptions, common: Common) -> str:
    """Sample, compare, write the report; returns its path as given.

    Raises:
        UsageError: an unknown metric, or one that does not apply to this model.
        ArtifactError: the reference is not the model the artifact was made from.
    """
    artifact = input_artifact(options.artifact, ["dilate", "calibrate", "distill", "export"], "export")
    if artifact.stage in ("distill", "export"):
        check_steps(artifact, options.steps)
    metrics = chosen_metrics(options, artifact)
    reference = find_reference(options, artifact)
    parameters = {
        "metrics": list(metrics),
        "samples": options.samples,
        "seed": options.seed,
        "steps": options.steps,
        "sampler": options.sampler,
        "batch_size": options.batch_size,
        "runtime": options.runtime,
        "grid": options.grid,
    }
    inputs: list[dict[str, Any]] = [{"name": artifact.given, "sha256": artifact.sha256, "stage": artifact.stage}]
    if reference is not None:
        inputs.append({"name": reference.given, "sha256": reference.sha256(), "stage": None})
    execute(
        "eval",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        common,
        lambda _key: produce(artifact, reference, metrics, options),
        kind="report",
        also=[options.grid] if options.grid else [],
    )
    if not common.dry_run:
        tell(artifact, read_manifest(options.output).metrics)
    return options.output


def chosen_metrics(options: EvalOptions, artifact: Artifact) -> tuple[str, ...]:
    """Those asked for, else all that apply to the model."""
    config = artifact.manifest.model["config"]
    is_digits = config.get("in_channels") == 1 and config.get("sample_size") == 16
    if options.metrics is None:
        return tuple(m for m in METRICS if m != "digits" or is_digits)
    if "digits" in options.metrics and config.get("in_channels") != 1:
        raise UsageError("the digit metrics read images of one channel", where="--metrics")
    return options.metrics


def find_reference(options: EvalOptions, artifact: Artifact) -> ModelSource | None:
    """The full-precision model to compare with; None when it was not named and is no longer where it was."""
    recorded = artifact.manifest.model
    given = options.reference or recorded["source"]
    try:
        source = resolve_model(given, recorded.get("source_config"))
        digest = source.sha256()
    except DqtoolError:
        if options.reference is not None:
            raise
        report.warn(f"the reference {given} is not there: figures against it are left out (name it with --reference)")
        return None
    if digest != recorded["source_sha256"]:
        raise ArtifactError(
            "The reference is not the model this artifact was made from",
            where=f"{given} and {artifact.given}",
            fix="Name the right one with --reference",
        )
    return source


def produce(
    artifact: Artifact, reference: ModelSource | None, metrics: tuple[str, ...], options: EvalOptions
) -> Product:
    """Sample from both networks with the same seeds and compute every figure."""
    from dqtool.models.families import family_of
    from dqtool.models.loading import build_network, load_weights
    from dqtool.models.sampling import Sampler, make_sampler
    from dqtool.nn.surgery import steps_of

    manifest = artifact.manifest
    family = family_of(manifest.model["class"], artifact.given)
    network = network_of_artifact(artifact, options.runtime)
    sampling = (manifest.pipeline or {}).get("sampling") or {
        "scheduler": (manifest.pipeline or {}).get("scheduler"),
        "steps": 20,
        "eta": 0.0,
    }
    scheduler = make_sampler(sampling["scheduler"], options.sampler)
    sampler = Sampler(family, scheduler, options.steps or sampling["steps"], sampling["eta"])
    float_network = None
    if reference is not None:
        float_network = build_network(reference.class_name, reference.config, load_weights(reference), reference.given)
    figures: dict[str, Any] = {}
    expected = None
    needs_images = bool({"digits", "similarity"} & set(metrics)) or options.grid is not None
    if needs_images:
        if float_network is not None and reference is not None:
            expected = reference_images(float_network, reference, sampler, options)
        images = draw(network, sampler, manifest.model["config"], options, "eval: samples")
        figures |= image_figures(images, expected, metrics)
        if "_dqtool_steps" in network.__dict__:
            figures["missed_timesteps"] = sorted(steps_of(network).missed)
        if options.grid is not None:
            from dqtool.metrics.grid import save_grid

            columns = [("full precision", expected)] if expected is not None else []
            save_grid([*columns, (bits_label(manifest.layers), images)], options.grid)
            figures["grid"] = {"file": os.path.basename(options.grid), "sha256": sha256_file(options.grid)}
    if "cost" in metrics:
        figures["cost"] = cost_figures(artifact)
    if "layers" in metrics and float_network is not None:
        figures["layer_errors"] = layer_errors(float_network, network, sampler, manifest.model["config"], options)
    return Product(None, manifest.model, manifest.pipeline, manifest.layers, figures)


def network_of_artifact(artifact: Artifact, runtime: str) -> nn.Module:
    """The network of an artifact of any stage."""
    manifest = artifact.manifest
    if artifact.stage == "export":
        from dqtool.runtimes import load

        return load(artifact.given, runtime)
    if artifact.stage == "distill":
        from dqtool.models.packed import packed_network, plans_of

        return packed_network(manifest.model["class"], manifest.model["config"], plans_of(manifest), artifact.tensors())
    from dqtool.stages.artifact_models import teacher_of

    return teacher_of(manifest, artifact.tensors())


def draw(network: nn.Module, sampler: Sampler, config: dict[str, Any], options: EvalOptions, what: str) -> Tensor:
    """`samples` images, `[N, C, H, W]`, clamped to [-1, 1]."""
    import torch

    shape = sampler.family.sample_shape(config)
    conditions = sampler.family.conditions(config, options.samples, torch.Generator().manual_seed(options.seed))
    batches = []
    with report.progress(what, options.samples, "image") as progress:
        for batch in sampler.batches(
            network,
            shape,
            options.samples,
            options.seed,
            options.batch_size,
            lambda start, stop: {k: v[start:stop] for k, v in conditions.items()},
        ):
            batches.append(batch.clamp(-1, 1))
            progress.advance(len(batch))
    return torch.cat(batches)


def reference_images(network: nn.Module, reference: ModelSource, sampler: Sampler, options: EvalOptions) -> Tensor:
    """The full-precision model's images, from the cache when the same ones were made before."""
    from dqtool.models.image_cache import cached_images
    from dqtool.models.sampling import IMAGES

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
    return cached_images(key, lambda: draw(network, sampler, reference.config, options, "eval: reference"))


def image_figures(images: Tensor, expected: Tensor | None, metrics: tuple[str, ...]) -> dict[str, Any]:
    """Figures on images, and where there is a reference the same figures of it and how they compare."""
    from dqtool.metrics.similarity import psnr

    figures: dict[str, Any] = {"samples": len(images)}
    if "digits" in metrics:
        from dqtool.metrics.digits import FEATURES, classify, evaluate_digits
        from dqtool.metrics.frechet import minimum_samples

        if len(images) < minimum_samples(FEATURES):
            report.warn(f"fd.digits of {len(images)} images is biased upwards; use {minimum_samples(FEATURES)} or more")
        figures |= evaluate_digits(images)
        if expected is not None:
            figures["reference"] = evaluate_digits(expected)
            figures["fd.digits_ratio"] = figures["fd.digits"] / figures["reference"]["fd.digits"]
            same = classify(images)[0] == classify(expected)[0]
            figures["same_digit_share"] = float(same.float().mean())
    if "similarity" in metrics and expected is not None:
        values = psnr(images, expected, 2.0)
        figures["psnr"] = {"mean": float(values.mean()), "median": float(values.median())}
    return figures


def cost_figures(artifact: Artifact) -> dict[str, Any]:
    """Bytes of the weights' file and bit operations, beside those of float32."""
    from dqtool.core.cost import bops, file_bytes, size_ratio
    from dqtool.models.families import family_of
    from dqtool.stages.export import network_shapes, swapped

    manifest = artifact.manifest
    shapes = network_shapes(family_of(manifest.model["class"], artifact.given), manifest.model["config"])
    full_bytes = file_bytes(swapped(shapes))
    layers = [{**layer, "bits": layer.get("bits", [32, 32])} for layer in manifest.layers]
    full_bops = bops([{**layer, "bits": [32, 32]} for layer in manifest.layers])
    if manifest.file is not None:
        size = int(manifest.file["bytes"])
    else:
        size = sum(e["bytes"] for name, e in (manifest.files or {}).items() if name.endswith(".safetensors"))
    if artifact.stage in ("dilate", "calibrate"):
        size = full_bytes
    return {
        "bytes": size,
        "bytes_float32": full_bytes,
        "size_ratio": size_ratio(full_bytes, size),
        "bops": bops(layers),
        "bops_float32": full_bops,
        "bops_ratio": full_bops / bops(layers),
    }


def layer_errors(
    reference: nn.Module, network: nn.Module, sampler: Sampler, config: dict[str, Any], options: EvalOptions
) -> dict[str, float]:
    """Relative squared error of each layer's output, |y' - y|² / |y|², at points of the reference's trajectory.

    Both networks run from the same (x_t, t), so a layer's figure holds its own error and what reached it.
    """
    import torch

    from dqtool.nn.trace import is_quantizable

    family = sampler.family
    images = max(1, LAYER_SAMPLES // sampler.steps)
    seen: dict[str, Tensor] = {}
    error: dict[str, float] = {}
    power: dict[str, float] = {}
    names = [name for name, module in reference.named_modules() if is_quantizable(module)]

    def keep(name: str) -> Any:
        return lambda _m, _a, y: seen.__setitem__(name, y)

    def compare(name: str) -> Any:
        def hook(_m: nn.Module, _a: tuple, y: Tensor) -> None:
            error[name] = error.get(name, 0.0) + float((y - seen[name]).double().square().sum())
            power[name] = power.get(name, 0.0) + float(seen[name].double().square().sum())

        return hook

    conditions = family.conditions(config, images, torch.Generator().manual_seed(options.seed))
    handles = [reference.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles += [network.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    try:
        with report.progress("eval: layers", sampler.steps) as progress:

            def see(x: Tensor, timestep: Tensor, _prediction: Tensor) -> None:
                with torch.no_grad():
                    family.predict(network, x, timestep, conditions)
                progress.advance()

            for _ in sampler.batches(
                reference, family.sample_shape(config), images, options.seed, images, lambda *_: conditions, see
            ):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return {name: error[name] / power[name] if power[name] else 0.0 for name in names if name in error}


def bits_label(layers: list[dict[str, Any]]) -> str:
    """`4/4` for a model most of whose multiply-accumulates run at 4/4; `float` before distillation."""
    weight: dict[str, int] = {}
    for layer in layers:
        if "bits" in layer and layer["kind"] != "attention" and min(layer["bits"]) < 16:
            key = "/".join(map(str, layer["bits"]))
            weight[key] = weight.get(key, 0) + layer["macs"]
    return max(weight, key=lambda key: weight[key]) if weight else "float"


def tell(artifact: Artifact, figures: dict[str, Any]) -> None:
    """The table on standard error."""
    rows: list[tuple[str, ...]] = []
    reference = figures.get("reference", {})
    for key in ("fd.digits", "is.digits", "confident_share"):
        if key in figures:
            rows.append((key, f"{figures[key]:.3f}", f"{reference[key]:.3f}" if key in reference else ""))
    if "same_digit_share" in figures:
        rows.append(("same digit as the reference", f"{figures['same_digit_share']:.1%}", ""))
    if "psnr" in figures:
        rows.append(("PSNR to the reference, dB", f"{figures['psnr']['mean']:.2f}", ""))
    if "cost" in figures:
        cost = figures["cost"]
        rows.append(("bytes", f"{cost['bytes']:,}", f"{cost['bytes_float32']:,}"))
        rows.append(("bit operations (G)", f"{cost['bops'] / 1e9:.2f}", f"{cost['bops_float32'] / 1e9:.2f}"))
    label = bits_label(artifact.manifest.layers)
    count = f", {figures['samples']} images" if "samples" in figures else ""
    report.table(f"{artifact.given}{count}", ["", label, "full precision"], rows)
    worst = sorted(figures.get("layer_errors", {}).items(), key=lambda item: -item[1])[:8]
    if worst:
        report.table("Layers with the largest error", ["layer", "|y'-y|²/|y|²"], [(n, f"{e:.4f}") for n, e in worst])

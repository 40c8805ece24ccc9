"""Resolution of the name that a user gives to a full-precision model and its files. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dqtool.artifacts import read_header
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.names import path_within
from dqtool.artifacts.records import ModelRecord
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.components.companion_files import components_of
from dqtool.models.sampling.schedules import choose_schedule
from dqtool.models.sources.hints import HINTS, ModelHints, is_scheduler_name
from dqtool.models.sources.hub_cache import hub_snapshot, is_hub_id
from dqtool.models.sources.lora_files import lora_file
from dqtool.models.sources.model_source import NETWORKS, ModelSource, config_in, network_config
from dqtool.models.sources.original import is_pickle
from dqtool.models.sources.reading import read_json
from dqtool.models.sources.single_files import single_file
from dqtool.models.sources.weight_files import find_weights

__all__ = ["NETWORKS", "ZOO", "ModelSource", "recorded_parts", "resolve_model", "resolve_recorded"]

ZOO = Path(__file__).parents[2] / "zoo" / "weights"
"""Directory of the embedded models, each a diffusers pipeline directory with float16 weights."""


def resolve_model(
    given: str,
    config: str | None = None,
    component: str | None = None,
    loras: Sequence[str] = (),
    hints: ModelHints | None = None,
) -> ModelSource:
    """Return the model that a user named.

    `given` is a `.safetensors` file with a `config.json` next to it (or `config`), a component directory, a pipeline
    directory, an original checkpoint, a Hub id `org/name[@revision]`, or `zoo:NAME`.

    `component` names the component of a pipeline to quantize instead of its denoiser; `loras` are `FILE[:WEIGHT]`;
    `hints` supplies what the files lack.

    Raises:
        EnvironmentFault: the path does not exist.
        ArtifactError: config or weights are missing or invalid.
        UsageError: the model lacks the component, or a LoRA's weight is no number.
    """
    hints = ModelHints() if hints is None else hints
    files = tuple(lora_file(text) for text in loras)
    if given.startswith("zoo:"):
        source = _directory(given, _embedded(given), config, component, None)
    elif not Path(given).exists() and is_hub_id(given):
        variant = hints.variant
        source = hub_snapshot(given, variant, lambda path: _directory(given, path, config, component, variant))
    elif not Path(given).exists():
        raise EnvironmentFault(
            "There is no such file or directory",
            where=given,
            fix="Give a .safetensors file, a diffusers directory, or an embedded model (`dqtool zoo list`)",
        )
    elif Path(given).is_file():
        if component is not None:
            raise UsageError(
                "A single file holds one network; components are those of a pipeline directory", where="--components"
            )
        source = single_file(given, Path(given), config, hints)
    else:
        source = _directory(given, Path(given), config, component, hints.variant)
    if hints.pipeline is not None and source.pipeline is None:
        source = _in_pipeline(source, hints.pipeline)
    given_schedule = source.scheduler
    schedule, unknown_schedule = choose_schedule(
        source.class_name, source.config, given_schedule, source.unknown_schedule, hints
    )
    own = source.own_scheduler if schedule == given_schedule else schedule
    return replace(source, loras=files, own_scheduler=own, unknown_schedule=unknown_schedule)


def resolve_recorded(model: ModelRecord, given: str | None = None) -> ModelSource:
    """Return the model that a manifest's `model` records, or the one at `given` resolved with the same options.

    Raises the errors of `resolve_model`.
    """
    return resolve_model(
        given or model.source,
        model.source_config,
        model.source_component,
        model.source_loras,
        ModelHints(**{key: value for key, value in model.source_told.items() if key in HINTS}),
    )


def recorded_parts(model: ModelRecord) -> list[str]:
    """Return the paths of a manifest's `model` beside the model itself: config, LoRAs, and what `ModelHints` names."""
    told, config, given = model.source_told, model.source_config, model.source_loras
    hints = [told[key] for key in ("scheduler", "tokenizer", "pipeline") if told.get(key) is not None]
    loras = [text if os.path.lexists(text) else text.rpartition(":")[0] or text for text in given]
    return [*([] if config is None else [config]), *loras, *(each for each in hints if not is_scheduler_name(each))]


def _embedded(given: str) -> Path:
    name = given.removeprefix("zoo:")
    names = sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))
    if name not in names:
        known = ", ".join(f"zoo:{each}" for each in names) or "none"
        raise EnvironmentFault("There is no such embedded model", where=given, fix=f"dqtool has {known}")
    return ZOO / name


def _in_pipeline(source: ModelSource, pipeline: str) -> ModelSource:
    """Return a bare network as the component of its class in a pipeline.

    Raises:
        EnvironmentFault: the pipeline's directory does not exist.
        ArtifactError: the directory is no pipeline, or has no component of the network's class.
    """
    base = _embedded(pipeline) if pipeline.startswith("zoo:") else Path(pipeline)
    if not base.exists():
        raise EnvironmentFault("There is no such directory", where=f"--pipeline {pipeline}")
    index = read_json(path_within(base, "model_index.json", pipeline, links=base))
    for name in components_of(index, f"{pipeline}, model_index.json"):
        if index[name][1] == source.class_name:
            return replace(source, pipeline=base, component=name)
    raise ArtifactError(
        f"This pipeline has no component of class {source.class_name}, the class of {source.given}",
        where=f"--pipeline {pipeline}, model_index.json",
    )


def _directory(given: str, path: Path, config: str | None, component: str | None, variant: str | None) -> ModelSource:
    if (path / "model_index.json").is_file():
        return _pipeline(given, path, component, variant)
    if (path / "modular_model_index.json").is_file():
        raise _modular(given, read_json(path / "modular_model_index.json"))
    if component is not None:
        raise UsageError("This directory is one network, not a pipeline of components", where="--components")
    return _component(given, path, None, "unet", config, variant)


def _pipeline(given: str, path: Path, component: str | None, variant: str | None) -> ModelSource:
    index = read_json(path_within(path, "model_index.json", given, links=path))
    names = components_of(index, f"{given}, model_index.json")
    there = [name for name in names if path_within(path, name, given, links=path).is_dir()]
    if component is not None:
        _check_component(component, there, index)
        return _component(given, path / component, path, component, None, variant)
    for name in NETWORKS:
        if name in there:
            return _component(given, path / name, path, name, None, variant)
    raise ArtifactError(
        "This pipeline holds no network that dqtool quantizes",
        where=f"{given}, model_index.json",
        fix=f"One of {', '.join(NETWORKS)} must be among its components; name another one with --components",
    )


def _modular(given: str, index: ForeignConfig) -> ArtifactError:
    """Return the error for a modular pipeline, whose index names the places of its components."""
    places = {name: entry[2] for name, entry in index.items() if isinstance(entry, list) and len(entry) > 2}
    place: ForeignConfig = next((places[name] for name in NETWORKS if isinstance(places.get(name), Mapping)), {})
    model = place.get("repo") or place.get("pretrained_model_name_or_path")
    command = f"dqtool dilate {model}" if model else "dqtool dilate on the pipeline that the index was made from"
    if model and place.get("variant"):
        command += f" --variant {place['variant']}"
    return ArtifactError(
        "This is the index of a modular pipeline, whose components lie elsewhere",
        where=f"{given}, modular_model_index.json",
        fix=f"Run {command}",
    )


def _check_component(component: str, there: Sequence[str], index: ForeignConfig) -> None:
    if "," in component:
        raise UsageError(
            f"One component at a time: '{component}' names several",
            where="--components",
            fix="Run the stages for the first, then `dqtool dilate` on the exported directory for the next",
        )
    if component not in there:
        raise UsageError(
            f"The pipeline has no component '{component}'", where="--components", fix=f"It has {', '.join(there)}"
        )
    if index[component][0] != "diffusers":
        raise UsageError(
            f"'{component}' is a {index[component][1]}, no denoising network: it stays float",
            where="--components",
            fix="Leave it out; the denoiser is what is quantized",
        )


def _component(
    given: str, path: Path, pipeline: Path | None, component: str, config: str | None, variant: str | None
) -> ModelSource:
    model = pipeline or path
    config_path = config_in(Path(config)) if config else path_within(path, "config.json", given, links=model)
    network = network_config(config_path, given)
    weights = find_weights(path, given, variant, model)
    for shard in weights:
        if not is_pickle(shard):
            read_header(shard)
    return ModelSource(given, weights, network, config_path, pipeline, component, variant=variant)

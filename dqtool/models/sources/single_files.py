"""Single files: original checkpoints with their text encoders and autoencoder, and bare weights with a config. No torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dqtool.artifacts import read_header
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.reading import open_regular
from dqtool.errors import ArtifactError
from dqtool.models.sampling.schedules import finite_config
from dqtool.models.sources.hints import ModelHints
from dqtool.models.sources.model_source import ModelSource, config_in, network_config, part_of
from dqtool.models.sources.original import Known, check_variant, is_pickle, recognise
from dqtool.models.sources.original.first_stage import first_stage_prefix
from dqtool.models.sources.original.pipelines import pipeline_of
from dqtool.models.sources.original.shell import Shell, pipeline_shell
from dqtool.models.sources.reading import read_json, read_yaml
from dqtool.models.sources.tokenizers import find_tokenizers

__all__ = ["single_file"]


def single_file(given: str, path: Path, config: str | None, hints: ModelHints) -> ModelSource:
    _refuse_gguf(path, given)
    if not is_pickle(path):
        read_header(path)  # raises for a file that is no safetensors file
    found = recognise(path)
    if found is not None:
        layout, entries = found
        check_variant(hints.variant, entries, given)
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        authors = config is not None and config.endswith((".yaml", ".yml"))
        yaml = read_yaml(Path(config)) if config and authors else None
        told_config = network_config(config_in(Path(config)), given) if config and not authors else None
        description = layout.describe(shapes, Known(yaml, told_config, hints.prediction_type), given)
        network = told_config or description.config
        own = layout.network(shapes)
        scheduler: ForeignConfig | None = finite_config(description.scheduler)
        unknown_schedule = description.unknown_schedule
        if hints.pipeline is not None and not description.explicit:
            scheduler = unknown_schedule = None  # the pipeline's scheduler is used
        source = ModelSource(
            given=given,
            weights=(path,),
            config=network,
            config_path=Path(config) if config else path,
            pipeline=None,
            component="unet",
            layout=layout.name,
            own_scheduler=scheduler,
            unknown_schedule=unknown_schedule,
            variant=hints.variant,
            entries={name: entries[name] for name in entries if name in own},
        )
        return _with_pipeline(source, path, entries, finite_config(description.scheduler), hints)
    if is_pickle(path):
        raise ArtifactError(
            "This is no original checkpoint of a kind that dqtool knows",
            where=given,
            fix="Give the diffusers directory of the model, or its weights as .safetensors with config.json next to them",
        )
    check_variant(hints.variant, (), given)
    config_path = config_in(Path(config)) if config else part_of(path.parent, "config.json")
    return ModelSource(given, (path,), network_config(config_path, given), config_path, None, "unet")


def _refuse_gguf(path: Path, given: str) -> None:
    """Raise `ArtifactError` for a GGUF file, by its name or its first bytes."""
    if path.suffix.lower() != ".gguf":
        with open_regular(path) as stream:
            if stream.read(4) != b"GGUF":
                return
    raise ArtifactError(
        "This is a GGUF file, whose weights are quantized already",
        where=given,
        fix="Give the full-precision model that it was made from, as .safetensors or as a diffusers directory",
    )


def _with_pipeline(
    source: ModelSource, path: Path, names: ForeignConfig, scheduler: ForeignConfig, hints: ModelHints
) -> ModelSource:
    """Return the source with a pipeline, made from the file's own components and the user's hints."""
    parts = pipeline_of(source.config, names)
    if parts is None:
        return source
    prefix = first_stage_prefix(names)
    texts = tuple(text for text in parts.texts if text.marker in names)
    whole = prefix is not None and len(texts) == len(parts.texts)
    source = replace(source, component=parts.network)
    base = None if hints.pipeline is None else Path(hints.pipeline)
    if not whole and (base is None or not (prefix or texts)):
        return source
    tokenizers = find_tokenizers(texts, hints.tokenizer, hints.pipeline)
    if tokenizers is None:
        fix = "name the directory of its tokenizer with --tokenizer DIR, or a pipeline of the same kind with --pipeline DIR"
        return replace(source, lacks=f"the file holds its text encoders but no tokenizer; to use prompts, {fix}")
    schedule = source.own_scheduler or _pipeline_schedule(base) or scheduler
    shell = Shell(parts, source.class_name, schedule, prefix, texts, tokenizers, base)
    return replace(source, pipeline=pipeline_shell(path, shell))


def _pipeline_schedule(base: Path | None) -> ForeignConfig | None:
    return None if base is None else finite_config(read_json(part_of(base, "scheduler/scheduler_config.json")))

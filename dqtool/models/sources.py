"""Finding a full-precision model: what a user may name, and the files behind it. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dqtool.artifacts import read_header
from dqtool.artifacts.files import content_digest
from dqtool.artifacts.manifest import canonical_json
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.companion_files import companion_digest
from dqtool.models.hub_cache import hub_snapshot, is_hub_id
from dqtool.models.lora_files import LoraFile, lora_file
from dqtool.models.original import Known, is_pickle, recognise
from dqtool.models.original.first_stage import first_stage_prefix
from dqtool.models.original.pipelines import pipeline_of
from dqtool.models.original.shell import Shell, pipeline_shell
from dqtool.models.reading import read_json, read_yaml
from dqtool.models.schedules import finite_config, settled_schedule
from dqtool.models.tokenizers import find_tokenizers
from dqtool.models.told import Told

__all__ = ["NETWORKS", "ZOO", "ModelSource", "resolve_model", "resolve_recorded"]

ZOO = Path(__file__).parent.parent / "zoo" / "weights"
"""Where the embedded models are packaged, each as a diffusers pipeline directory with float16 weights."""

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors")
NETWORKS = ("unet", "transformer", "prior")
"""Names under which pipelines hold their denoiser, which is quantized unless another component is named."""


@dataclass(frozen=True)
class ModelSource:
    """A model as it lies on disk: the network's weights and config and, if it is a pipeline, where the rest is.

    `layout` names the format of an original checkpoint (`dqtool.models.original`). `own_scheduler` is the noise schedule of an
    original checkpoint, or one that was told; it goes before the pipeline's. `asks` says what of the schedule nobody knows
    yet, `lacks` what keeps the rest of a file from being used. `loras` are added to the weights when these are loaded.
    """

    given: str
    weights: tuple[Path, ...]
    config: dict[str, Any]
    config_path: Path
    pipeline: Path | None
    component: str
    layout: str | None = None
    own_scheduler: dict[str, Any] | None = None
    asks: str | None = None
    lacks: str | None = None
    loras: tuple[LoraFile, ...] = ()
    entries: dict[str, dict[str, Any]] | None = field(default=None, repr=False)

    @property
    def class_name(self) -> str:
        """The diffusers class of the network."""
        return str(self.config["_class_name"])

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """The scheduler config that was told, of the original checkpoint or of the pipeline; None for a bare component."""
        if self.own_scheduler is not None or self.pipeline is None:
            return self.own_scheduler
        return finite_config(read_json(self.pipeline / "scheduler" / "scheduler_config.json"))

    @property
    def model_index(self) -> dict[str, Any] | None:
        """The pipeline's `model_index.json`, with the class of the scheduler in use; None for a bare component."""
        if self.pipeline is None:
            return None
        index = read_json(self.pipeline / "model_index.json")
        if self.own_scheduler is not None:
            index["scheduler"] = ["diffusers", self.own_scheduler["_class_name"]]
        return index

    def check_schedule(self) -> None:
        """Raise `UsageError` where nobody knows what the network predicts or by which schedule."""
        if self.asks is None:
            return
        option = "--scheduler FILE" if "schedule" in self.asks else "--prediction-type epsilon or v_prediction"
        raise UsageError(self.asks[0].upper() + self.asks[1:], where=self.given, fix=f"Say it with {option}")

    def pipeline_record(self) -> dict[str, Any] | None:
        """What a manifest says of the pipeline around the network; of an original checkpoint only the noise schedule."""
        if self.pipeline is not None:
            return {"model_index": self.model_index, "component": self.component, "scheduler": self.scheduler}
        return None if self.own_scheduler is None else {"scheduler": self.own_scheduler}

    def sha256(self) -> str:
        """Hex digest over weights, config and LoRAs: what a fingerprint takes the model for."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [content_digest(path) for path in self.weights]
        parts.append(hashlib.sha256(canonical_json([self.config, self.scheduler]).encode()).hexdigest())
        parts += [f"{lora.sha256()}:{lora.weight!r}" for lora in self.loras]
        if self.pipeline is not None:
            parts.append(companion_digest(self.pipeline, self.model_index or {}, self.component))
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def tensor_entries(self) -> dict[str, dict[str, Any]]:
        """Name -> {dtype, shape} of the network's tensors under the files' own names, without loading any."""
        if self.entries is not None:
            return self.entries
        return {name: entry for path in self.weights for name, entry in read_header(path).items()}


def resolve_model(
    given: str,
    config: str | None = None,
    component: str | None = None,
    loras: Sequence[str] = (),
    told: Told | None = None,
) -> ModelSource:
    """Return the model a user named: a `.safetensors` file with `config.json` beside it (or `config`), a component directory,
    a pipeline directory, an original checkpoint, a Hub id `org/name[@revision]`, or `zoo:NAME`.

    `component` names the network of a pipeline that is meant, where that is not its denoiser; `loras` are
    `FILE[:WEIGHT]`; `told` is what the files don't say.

    Raises:
        EnvironmentFault: there is nothing at that path.
        ArtifactError: there is something else: no config, no weights, no safetensors file.
        UsageError: a component that the model does not have, or a LoRA's weight that is no number.
    """
    told = Told() if told is None else told
    files = tuple(lora_file(text) for text in loras)
    if given.startswith("zoo:"):
        source = _directory(given, _embedded(given), config, component)
    elif not Path(given).exists() and is_hub_id(given):
        source = hub_snapshot(given, component, lambda path: _directory(given, path, config, component))
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
        source = _file(given, Path(given), config, told)
    else:
        source = _directory(given, Path(given), config, component)
    if told.pipeline is not None and source.pipeline is None:
        source = _in_pipeline(source, told.pipeline)
    given_schedule = source.scheduler
    schedule, asks = settled_schedule(source.class_name, source.config, given_schedule, source.asks, told)
    own = source.own_scheduler if schedule == given_schedule else schedule
    return replace(source, loras=files, own_scheduler=own, asks=asks)


def resolve_recorded(model: Mapping[str, Any], given: str | None = None) -> ModelSource:
    """The model that a manifest's `model` was made from, or `given` in its place, read in the same way.

    Raises what `resolve_model` raises.
    """
    return resolve_model(
        given or model["source"],
        model.get("source_config"),
        model.get("source_component"),
        model.get("source_loras", ()),
        Told(**model.get("source_told", {})),
    )


def _embedded(given: str) -> Path:
    name = given.removeprefix("zoo:")
    names = sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))
    if name not in names:
        known = ", ".join(f"zoo:{each}" for each in names) or "none"
        raise EnvironmentFault("There is no such embedded model", where=given, fix=f"dqtool has {known}")
    return ZOO / name


def _file(given: str, path: Path, config: str | None, told: Told) -> ModelSource:
    if not is_pickle(path):
        read_header(path)  # refuses what is no safetensors file
    found = recognise(path)
    if found is not None:
        layout, entries = found
        shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
        authors = config is not None and config.endswith((".yaml", ".yml"))
        yaml = read_yaml(Path(config)) if config and authors else None
        told_config = _network_config(_config_in(Path(config)), given) if config and not authors else None
        description = layout.describe(shapes, Known(yaml, told_config, told.prediction_type), given)
        network = told_config or description.config
        own = layout.network(shapes)
        scheduler: dict[str, Any] | None = finite_config(description.scheduler)
        asks = description.asks
        if told.pipeline is not None and not description.explicit:
            scheduler = asks = None  # the pipeline's is the one that the model is sampled with
        source = ModelSource(
            given=given,
            weights=(path,),
            config=network,
            config_path=Path(config) if config else path,
            pipeline=None,
            component="unet",
            layout=layout.name,
            own_scheduler=scheduler,
            asks=asks,
            entries={name: entries[name] for name in entries if name in own},
        )
        return _beside(source, path, entries, finite_config(description.scheduler), told)
    if is_pickle(path):
        raise ArtifactError(
            "This is no original checkpoint of a kind that dqtool knows",
            where=given,
            fix="Give the diffusers directory of the model, or its weights as .safetensors with config.json beside them",
        )
    config_path = _config_in(Path(config)) if config else path.parent / "config.json"
    return ModelSource(given, (path,), _network_config(config_path, given), config_path, None, "unet")


def _beside(
    source: ModelSource, path: Path, names: Mapping[str, Any], scheduler: Mapping[str, Any], told: Told
) -> ModelSource:
    """The source with a pipeline around it, made of what the file holds and of what is told."""
    parts = pipeline_of(source.config, names)
    if parts is None:
        return source
    prefix = first_stage_prefix(names)
    texts = tuple(text for text in parts.texts if text.marker in names)
    whole = prefix is not None and len(texts) == len(parts.texts)
    source = replace(source, component=parts.network)
    base = None if told.pipeline is None else Path(told.pipeline)
    if not whole and (base is None or not (prefix or texts)):
        return source
    tokenizers = find_tokenizers(texts, told.tokenizer, told.pipeline)
    if tokenizers is None:
        fix = "name the directory of its tokenizer with --tokenizer DIR, or a pipeline of the same kind with --pipeline DIR"
        return replace(source, lacks=f"the file holds its text encoders but no tokenizer; to use prompts, {fix}")
    schedule = source.own_scheduler or _pipeline_schedule(base) or scheduler
    shell = Shell(parts, source.class_name, schedule, prefix, texts, tokenizers, base)
    return replace(source, pipeline=pipeline_shell(path, shell))


def _pipeline_schedule(base: Path | None) -> dict[str, Any] | None:
    return None if base is None else finite_config(read_json(base / "scheduler" / "scheduler_config.json"))


def _in_pipeline(source: ModelSource, pipeline: str) -> ModelSource:
    """A bare network in the place of its like in a pipeline.

    Raises:
        EnvironmentFault: the pipeline is not there.
        ArtifactError: it is no pipeline, or has no component of the network's class.
    """
    base = _embedded(pipeline) if pipeline.startswith("zoo:") else Path(pipeline)
    if not base.exists():
        raise EnvironmentFault("There is no such directory", where=f"--pipeline {pipeline}")
    index = read_json(base / "model_index.json")
    for name, entry in index.items():
        if isinstance(entry, list) and entry[1] == source.class_name:
            return replace(source, pipeline=base, component=name)
    raise ArtifactError(
        f"This pipeline has no component of class {source.class_name}, which {source.given} is",
        where=f"--pipeline {pipeline}, model_index.json",
    )


def _config_in(config: Path) -> Path:
    """The config of a network that is named by its file, its directory or its pipeline's directory."""
    if not config.is_dir() or (config / "config.json").is_file():
        return config / "config.json" if config.is_dir() else config
    inside = [config / name / "config.json" for name in NETWORKS]
    return next((path for path in inside if path.is_file()), config / "config.json")


def _directory(given: str, path: Path, config: str | None, component: str | None) -> ModelSource:
    if (path / "model_index.json").is_file():
        return _pipeline(given, path, component)
    if component is not None:
        raise UsageError("This directory is one network, not a pipeline of components", where="--components")
    return _component(given, path, None, "unet", config)


def _pipeline(given: str, path: Path, component: str | None) -> ModelSource:
    index = read_json(path / "model_index.json")
    there = [name for name, entry in index.items() if isinstance(entry, list) and (path / name).is_dir()]
    if component is not None:
        _check_component(component, there, index)
        return _component(given, path / component, path, component, None)
    for name in NETWORKS:
        if name in there:
            return _component(given, path / name, path, name, None)
    raise ArtifactError(
        "This pipeline holds no network that dqtool quantizes",
        where=f"{given}, model_index.json",
        fix=f"One of {', '.join(NETWORKS)} must be among its components; name another one with --components",
    )


def _check_component(component: str, there: Sequence[str], index: Mapping[str, Any]) -> None:
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


def _component(given: str, path: Path, pipeline: Path | None, component: str, config: str | None) -> ModelSource:
    config_path = _config_in(Path(config)) if config else path / "config.json"
    network = _network_config(config_path, given)
    for name in WEIGHT_NAMES:
        if (path / name).is_file():
            weights: tuple[Path, ...] = (path / name,)
            break
        if (path / f"{name}.index.json").is_file():
            index = read_json(path / f"{name}.index.json")
            if not isinstance(index.get("weight_map"), dict):
                raise ArtifactError("This index of shards has no weight_map", where=str(path / f"{name}.index.json"))
            shards = index["weight_map"].values()
            weights = tuple(path / shard for shard in sorted(set(shards)))
            break
    else:
        raise ArtifactError(
            "This directory holds no safetensors weights",
            where=given,
            fix=f"Expected {WEIGHT_NAMES[0]} in it; convert .bin weights with diffusers' save_pretrained",
        )
    for shard in weights:
        read_header(shard)
    return ModelSource(given, weights, network, config_path, pipeline, component)


def _network_config(path: Path, given: str) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(
            f"There is no model config at {path}",
            where=given,
            fix="Put the diffusers config.json beside the weights or name it with --config FILE",
        )
    config = read_json(path)
    if "_class_name" not in config:
        raise ArtifactError("This config does not name its network's class", where=f"{path}, key _class_name")
    if "quantization_config" in config:
        raise ArtifactError(
            "This model is quantized already", where=str(path), fix="Give the full-precision model it was made from"
        )
    return config

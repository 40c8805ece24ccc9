"""Finding a full-precision model: what a user may name, and the files behind it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts import read_header, sha256_file
from dqtool.artifacts.files import os_fault
from dqtool.artifacts.manifest import canonical_json
from dqtool.errors import ArtifactError, EnvironmentFault

__all__ = ["ZOO", "ModelSource", "finite_config", "resolve_model"]

ZOO = Path(__file__).parent.parent / "zoo" / "weights"
"""Where the embedded models are packaged, each as a diffusers pipeline directory with float16 weights."""

WEIGHT_NAMES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "model.safetensors")
NETWORKS = ("unet", "transformer", "prior")
"""Names under which pipelines hold the network that is quantized."""


@dataclass(frozen=True)
class ModelSource:
    """A model as it lies on disk: the network's weights and config and, if it is a pipeline, where the rest is."""

    given: str
    weights: tuple[Path, ...]
    config: dict[str, Any]
    config_path: Path
    pipeline: Path | None
    component: str

    @property
    def class_name(self) -> str:
        """The diffusers class of the network."""
        return str(self.config["_class_name"])

    @property
    def scheduler(self) -> dict[str, Any] | None:
        """The pipeline's scheduler config; None for a bare component."""
        if self.pipeline is None:
            return None
        return finite_config(_read_json(self.pipeline / "scheduler" / "scheduler_config.json"))

    @property
    def model_index(self) -> dict[str, Any] | None:
        """The pipeline's `model_index.json`; None for a bare component."""
        return None if self.pipeline is None else _read_json(self.pipeline / "model_index.json")

    def sha256(self) -> str:
        """Hex digest over weights and config: what a fingerprint takes the model for."""
        parts = [sha256_file(path) for path in self.weights]
        parts.append(hashlib.sha256(canonical_json([self.config, self.scheduler]).encode()).hexdigest())
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def finite_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as a manifest can hold it. JSON knows no infinity, which stands only for "no limit", the
    default of its key, so that leaving it out says the same."""
    return {
        key: value
        for key, value in config.items()
        if key != "_use_default_values" and not (isinstance(value, float) and not math.isfinite(value))
    }


def resolve_model(given: str, config: str | None = None) -> ModelSource:
    """The model a user named: a `.safetensors` file with `config.json` beside it (or `config`), a component directory,
    a pipeline directory, or `zoo:NAME`.

    Raises:
        EnvironmentFault: there is nothing at that path.
        ArtifactError: there is something else: no config, no weights, no safetensors file.
    """
    if given.startswith("zoo:"):
        name = given.removeprefix("zoo:")
        names = sorted(path.parent.name for path in ZOO.glob("*/model_index.json"))
        if name not in names:
            known = ", ".join(f"zoo:{each}" for each in names) or "none"
            raise EnvironmentFault("There is no such embedded model", where=given, fix=f"dqtool has {known}")
        path = ZOO / name
    else:
        path = Path(given)
    if not path.exists():
        raise EnvironmentFault(
            "There is no such file or directory",
            where=given,
            fix="Give a .safetensors file, a diffusers directory, or an embedded model (`dqtool zoo list`)",
        )
    if path.is_file():
        return _file(given, path, config)
    if (path / "model_index.json").is_file():
        return _pipeline(given, path)
    return _component(given, path, None, "unet", config)


def _file(given: str, path: Path, config: str | None) -> ModelSource:
    read_header(path)  # refuses what is no safetensors file
    config_path = Path(config) if config else path.parent / "config.json"
    return ModelSource(given, (path,), _network_config(config_path, given), config_path, None, "unet")


def _pipeline(given: str, path: Path) -> ModelSource:
    index = _read_json(path / "model_index.json")
    for name in NETWORKS:
        if name in index and (path / name).is_dir():
            return _component(given, path / name, path, name, None)
    raise ArtifactError(
        "This pipeline holds no network that dqtool quantizes",
        where=f"{given}, model_index.json",
        fix=f"One of {', '.join(NETWORKS)} must be among its components",
    )


def _component(given: str, path: Path, pipeline: Path | None, component: str, config: str | None) -> ModelSource:
    config_path = Path(config) if config else path / "config.json"
    network = _network_config(config_path, given)
    for name in WEIGHT_NAMES:
        if (path / name).is_file():
            weights: tuple[Path, ...] = (path / name,)
            break
        if (path / f"{name}.index.json").is_file():
            index = _read_json(path / f"{name}.index.json")
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
    if not path.is_file():
        raise ArtifactError(
            f"There is no model config at {path}",
            where=given,
            fix="Put the diffusers config.json beside the weights or name it with --config FILE",
        )
    config = _read_json(path)
    if "_class_name" not in config:
        raise ArtifactError("This config does not name its network's class", where=f"{path}, key _class_name")
    if "quantization_config" in config:
        raise ArtifactError(
            "This model is quantized already", where=str(path), fix="Give the full-precision model it was made from"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise ArtifactError("A part of this model is missing", where=str(path)) from e
    except ValueError as e:
        raise ArtifactError(f"This is no valid JSON: {e}", where=str(path)) from e
    except OSError as e:
        raise os_fault(e, path) from e
    if not isinstance(value, dict):
        raise ArtifactError("This is no JSON object", where=str(path))
    return value

"""Description of a full-precision model on disk. Imports no torch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dqtool.artifacts.files import content_digest
from dqtool.artifacts.header import TensorEntry
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.names import path_within
from dqtool.artifacts.records import PipelineRecord
from dqtool.errors import ArtifactError, UsageError
from dqtool.models.components.companion_files import companion_digest
from dqtool.models.sampling.schedules import finite_config
from dqtool.models.sources.lora_files import LoraFile
from dqtool.models.sources.original.checkpoint import read_entries
from dqtool.models.sources.reading import read_json

__all__ = ["NETWORKS", "ModelSource", "config_in", "network_config", "part_of"]

NETWORKS = ("unet", "transformer", "prior")
"""Component names of a pipeline's denoiser, which is quantized unless the user names another component."""


@dataclass(frozen=True)
class ModelSource:
    """A model on disk: the network's weights and config and, for a pipeline, the place of its other components.

    Attributes:
        layout: format of an original checkpoint (`dqtool.models.sources.original`).
        own_scheduler: noise schedule of an original checkpoint or of the user; takes precedence over the pipeline's.
        unknown_schedule: description of the part of the schedule that is unknown; None where all is known.
        lacks: reason why the other components of a single file can't be used.
        loras: LoRAs that are added to the weights at loading.
        variant: chosen set of weights, for the pipeline's other components too.
    """

    given: str
    weights: tuple[Path, ...]
    config: ForeignConfig
    config_path: Path
    pipeline: Path | None
    component: str
    layout: str | None = None
    own_scheduler: ForeignConfig | None = None
    unknown_schedule: str | None = None
    lacks: str | None = None
    loras: tuple[LoraFile, ...] = ()
    variant: str | None = None
    entries: dict[str, TensorEntry] | None = field(default=None, repr=False)

    @property
    def class_name(self) -> str:
        """Return the diffusers class of the network."""
        return str(self.config["_class_name"])

    @property
    def scheduler(self) -> ForeignConfig | None:
        """Return the scheduler config of the user, the original checkpoint or the pipeline; None for a bare component."""
        if self.own_scheduler is not None or self.pipeline is None:
            return self.own_scheduler
        return finite_config(read_json(part_of(self.pipeline, "scheduler/scheduler_config.json")))

    @property
    def model_index(self) -> ForeignConfig | None:
        """Return the pipeline's `model_index.json` with the class of the scheduler in use; None for a bare component."""
        if self.pipeline is None:
            return None
        index = dict(read_json(part_of(self.pipeline, "model_index.json")))
        if self.own_scheduler is not None:
            index["scheduler"] = ["diffusers", self.own_scheduler["_class_name"]]
        return index

    def check_schedule(self) -> None:
        """Raise `UsageError` where the prediction type or the noise schedule is unknown."""
        if self.unknown_schedule is None:
            return
        option = (
            "--scheduler FILE" if "schedule" in self.unknown_schedule else "--prediction-type epsilon or v_prediction"
        )
        raise UsageError(
            self.unknown_schedule[0].upper() + self.unknown_schedule[1:], where=self.given, fix=f"Set it with {option}"
        )

    def pipeline_record(self) -> PipelineRecord | None:
        """Return the manifest's entry on the pipeline; for an original checkpoint it holds the noise schedule alone."""
        if self.pipeline is not None:
            return PipelineRecord(self.component, self.model_index, self.scheduler)
        return None if self.own_scheduler is None else PipelineRecord(scheduler=self.own_scheduler)

    def sha256(self) -> str:
        """Return the hex digest over weights, config and LoRAs that identifies the model in fingerprints."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = [content_digest(path) for path in self.weights]
        parts.append(hashlib.sha256(canonical_json([self.config, self.scheduler]).encode()).hexdigest())
        if self.layout is not None and self.variant is not None:
            parts.append(self.variant)  # one file holds several
        parts += [f"{lora.sha256()}:{lora.weight!r}" for lora in self.loras]
        if self.pipeline is not None:
            parts.append(companion_digest(self.pipeline, self.model_index or {}, self.component, self.variant))
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def tensor_entries(self) -> dict[str, TensorEntry]:
        """Return {name: {dtype, shape}} of the network's tensors under the files' own names, without loading them."""
        if self.entries is not None:
            return self.entries
        return {name: entry for path in self.weights for name, entry in read_entries(path).items()}


def part_of(model: Path, name: str) -> Path:
    """Return the path of a file in the directory `model`; `ArtifactError` where a symbolic link leads out of it."""
    return path_within(model, name, str(model), links=model)


def config_in(config: Path) -> Path:
    """Return the config's path for a given config file, network directory or pipeline directory."""
    if not config.is_dir() or (config / "config.json").is_file():
        return part_of(config, "config.json") if config.is_dir() else config
    inside = [part_of(config, f"{name}/config.json") for name in NETWORKS]
    return next((path for path in inside if path.is_file()), config / "config.json")


def network_config(path: Path, given: str) -> ForeignConfig:
    if not path.exists():
        raise ArtifactError(
            f"There is no model config at {path}",
            where=given,
            fix="Put the diffusers config.json next to the weights or name it with --config FILE",
        )
    config = read_json(path)
    if "_class_name" not in config:
        raise ArtifactError("This config does not name its network's class", where=f"{path}, key _class_name")
    if "quantization_config" in config:
        raise ArtifactError(
            "This model is quantized already", where=str(path), fix="Give the full-precision model it was made from"
        )
    return config

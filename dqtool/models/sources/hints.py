"""Hints that the user gives about a model because its files lack them, such as the prediction type. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.names import path_within
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.sources.reading import read_json

__all__ = [
    "HINTS",
    "PREDICTION_TYPES",
    "ModelHints",
    "is_flow",
    "is_scheduler_name",
    "scheduler_config",
    "with_prediction_type",
]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""Prediction types of networks, in diffusers' terms."""


@dataclass(frozen=True)
class ModelHints:
    """Hints about a model; None leaves the choice to its files.

    Attributes:
        prediction_type: one of `PREDICTION_TYPES`.
        scheduler: a scheduler_config.json or a directory that holds one.
        tokenizer: directory with the tokenizer of a single file.
        pipeline: pipeline directory with the components that the model lacks.
        variant: set of weights to read where there are several (`fp16`, `ema`, ...).
    """

    prediction_type: str | None = None
    scheduler: str | None = None
    tokenizer: str | None = None
    pipeline: str | None = None
    variant: str | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for a prediction type that does not exist."""
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            raise UsageError(
                f"'{self.prediction_type}' is no prediction type",
                where="--prediction-type",
                fix=f"Choose from {', '.join(PREDICTION_TYPES)}",
            )

    def record(self) -> dict[str, str]:
        """Return the given hints as a manifest stores them."""
        return {key: value for key, value in asdict(self).items() if value is not None}


HINTS = frozenset(field.name for field in fields(ModelHints))
"""Names of the hints."""


def is_scheduler_name(given: str) -> bool:
    """Return whether `--scheduler` names a class of diffusers and no path."""
    return re.fullmatch(r"[A-Z]\w*Scheduler", given) is not None


def scheduler_config(given: str) -> ForeignConfig:
    """Return the scheduler config that `given` names.

    `given` is a JSON file, a scheduler directory, a pipeline directory, or the name of a diffusers scheduler, which stands
    for its defaults.

    Raises:
        EnvironmentFault: the path does not exist.
        ArtifactError: the file is no scheduler config.
    """
    path = Path(given)
    if not path.exists() and is_scheduler_name(given):
        return {"_class_name": given}
    if not path.exists():
        raise EnvironmentFault("There is no such file or directory", where=f"--scheduler {given}")
    if path.is_dir():
        names = ("scheduler_config.json", "scheduler/scheduler_config.json")
        inside = [path_within(path, name, given, links=path) for name in names]
        path = next((each for each in inside if each.is_file()), inside[0])
    config = read_json(path)
    if "Scheduler" not in str(config.get("_class_name")):
        raise ArtifactError(
            "This is no config of a diffusers scheduler",
            where=f"--scheduler {path}, key _class_name",
            fix="Give a scheduler_config.json, or a directory with one, such as a pipeline's",
        )
    return config


def is_flow(config: ForeignConfig) -> bool:
    """Return whether a scheduler's config follows flow matching."""
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow) or str(config.get("_class_name")).startswith("FlowMatch")


def with_prediction_type(config: ForeignConfig, kind: str) -> ForeignConfig:
    """Return the scheduler config for a network that predicts `kind`.

    Raises:
        UsageError: one of schedule and `kind` is of flow matching and the other is not.
    """
    if is_flow(config) != (kind == "flow_prediction"):
        raise UsageError(
            f"A network of prediction type {kind} can't be sampled with this {config.get('_class_name')}",
            where="--prediction-type",
            fix="Give the schedule that the model was trained with by --scheduler FILE",
        )
    if str(config.get("_class_name")).startswith("FlowMatch"):
        return dict(config)
    return {**config, "prediction_type": kind}

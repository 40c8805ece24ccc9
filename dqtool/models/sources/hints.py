"""What a user says of a model beyond naming it, because its files don't: prediction type, noise schedule. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts.names import path_within
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.sources.reading import read_json

__all__ = ["PREDICTION_TYPES", "ModelHints", "is_flow", "scheduler_config", "with_prediction_type"]

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""What a network can predict, in diffusers' terms."""


@dataclass(frozen=True)
class ModelHints:
    """`prediction_type` is one of `PREDICTION_TYPES`; `scheduler` a scheduler_config.json or a directory that holds one;
    `tokenizer` a directory with the tokenizer of a single file; `pipeline` a pipeline directory with what the model lacks; `variant`
    the one of several sets of weights that is meant (`fp16`, `ema`, ...)."""

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
        """Return what was said, as a manifest keeps it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def scheduler_config(given: str) -> dict[str, Any]:
    """Return the scheduler config at `given`: a JSON file, a scheduler directory, a pipeline directory, or the name of a diffusers
    scheduler, which stands for its defaults.

    Raises:
        EnvironmentFault: there is nothing.
        ArtifactError: it is no scheduler's config.
    """
    path = Path(given)
    if not path.exists() and re.fullmatch(r"[A-Z]\w*Scheduler", given):
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


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a scheduler's config follows flow matching."""
    flow = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    return bool(flow) or str(config.get("_class_name")).startswith("FlowMatch")


def with_prediction_type(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the scheduler config for a network that predicts `kind`.

    Raises:
        UsageError: the schedule is one of flow matching and `kind` is not, or the other way round.
    """
    if is_flow(config) != (kind == "flow_prediction"):
        raise UsageError(
            f"A network of prediction type {kind} can't be sampled with a {config.get('_class_name')} as it is set",
            where="--prediction-type",
            fix="Name the schedule that the model was trained with by --scheduler FILE",
        )
    if str(config.get("_class_name")).startswith("FlowMatch"):
        return dict(config)
    return {**config, "prediction_type": kind}

"""The options of commands that name files: those that are read, and those that are written. Imports no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dqtool.models.sources.resolve import ModelSource

__all__ = ["READ", "WRITTEN", "model_places", "read_paths"]

READ = frozenset(
    {
        "model",
        "artifact",
        "directory",
        "places",
        "config",
        "stats",
        "example",
        "lora",
        "prompts",
        "conditions",
        "images",
        "statistics",
        "apply_to",
        "pipeline",
        "scheduler",
        "tokenizer",
        "reference",
        "inception_weights",
        "ref_stats",
        "clip",
        "aesthetic_weights",
    }
)
"""Fields of options that name files or directories which a command reads; its outputs must keep clear of them."""

WRITTEN = frozenset({"output", "grid", "save_samples"})
"""Fields of options that name what a command writes."""


def read_paths(options: Any) -> list[str]:
    """Return the paths that the options of a command name as its inputs. Some may not exist: a Hub id, `zoo:NAME`."""
    return list(_paths(options))


def model_places(model: Any) -> list[str | Path]:
    """Return all files and directories that a model (`ModelSource`) consists of; of an exported reference its directory."""
    if not isinstance(model, ModelSource):
        return [] if model is None else [model.given]
    places: list[str | Path] = [model.given, *model.weights, model.config_path, *(lora.path for lora in model.loras)]
    return places if model.pipeline is None else [*places, model.pipeline]


def _paths(options: Any) -> Iterator[str]:
    for field in dataclasses.fields(options):
        if field.name not in READ:
            continue
        value = getattr(options, field.name)
        if isinstance(value, bool):  # a switch: --clip is one in calibrate, and a directory in eval
            continue
        for text in (value,) if isinstance(value, str) else value or ():
            yield text
            if not os.path.lexists(text):  # a LoRA, as FILE:WEIGHT
                yield text.rpartition(":")[0] or text

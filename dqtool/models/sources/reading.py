"""Readers of models' JSON and YAML files. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.reading import load_json
from dqtool.errors import ArtifactError, UsageError
from dqtool.yamltree import compose, plain_value, read_text

__all__ = ["read_json", "read_yaml"]


def read_json(path: Path) -> ForeignConfig:
    """Return the object in a JSON file, with or without a byte order mark.

    Raises:
        ArtifactError: the file is missing, holds something else, or is beyond the bounds of `artifacts.reading`.
    """
    if not os.path.lexists(path):
        raise ArtifactError("A part of this model is missing", where=str(path))
    return load_json(path, finite=False)


def read_yaml(path: Path) -> ForeignConfig:
    """Return the mapping in a YAML file.

    Raises:
        ArtifactError: the file holds something else, or is beyond the bounds of `yamltree`.
    """
    try:
        value = plain_value(compose(read_text(path, "config", ArtifactError), str(path)))
    except UsageError as e:  # the reader of recipes reports usage errors
        raise ArtifactError(f"This config is no valid YAML: {e.what}", where=e.where) from e
    if not isinstance(value, dict):
        raise ArtifactError("This config is no YAML mapping", where=str(path))
    return value

"""The small text files of models: JSON and YAML. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dqtool.artifacts.files import os_fault
from dqtool.errors import ArtifactError

__all__ = ["read_json", "read_yaml"]


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, whether or not a byte order mark stands before it.

    Raises:
        ArtifactError: the file is missing, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as e:
        raise ArtifactError("A part of this model is missing", where=str(path)) from e
    except ValueError as e:
        raise ArtifactError(f"This is no valid JSON: {e}", where=str(path)) from e
    except OSError as e:
        raise os_fault(e, path) from e
    if not isinstance(value, dict):
        raise ArtifactError("This is no JSON object", where=str(path))
    return value


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ArtifactError: it holds something else.
    """
    import yaml

    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ArtifactError("This config is no valid YAML", where=str(path)) from e
    except OSError as e:
        raise os_fault(e, path) from e
    if not isinstance(value, dict):
        raise ArtifactError("This config is no YAML mapping", where=str(path))
    return value

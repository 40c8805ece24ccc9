"""Types of JSON values, as they stand in manifests, reports and configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

__all__ = ["ForeignConfig", "Json", "JsonObject"]

Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A JSON value that dqtool writes."""

JsonObject: TypeAlias = Mapping[str, "Json"]
"""A JSON object that dqtool writes. Who reads one makes a record of it (`dqtool.artifacts.schema.record`)."""

ForeignConfig: TypeAlias = Mapping[str, Any]
"""The config of a diffusers or transformers class, or another library's file: its keys are that library's own."""

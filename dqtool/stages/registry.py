"""The stages by name: where each one is and what it can be told. The command line and recipes both ask here."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from dqtool.errors import UsageError
from dqtool.stages.common import Common

__all__ = ["STAGES", "make_options", "option_types", "stage_function"]

STAGES = {
    "dilate": ("DilateOptions", "dilate"),
    "calibrate": ("CalibrateOptions", "calibrate"),
    "distill": ("DistillOptions", "distill"),
    "export": ("ExportOptions", "export"),
    "eval": ("EvalOptions", "evaluate"),
    "sample": ("SampleOptions", "sample"),
    "stats": ("StatsOptions", "stats"),
}
"""`dqtool NAME` is `dqtool.stages.NAME`: the names of its options class and of its function (options, common) -> path."""

_LEAST = {
    "steps": 1,
    "samples": 1,
    "batch_size": 1,
    "number": 1,
    "seed": 0,
    "eta": 0,
    "guidance": 0,
    "iters": 0,
    "refine_iters": 0,
    "train_samples": 1,
    "cache_memory": 0,
    "cap": 1,
    "threshold": 1,
    "image_size": 1,
    "keep_images": 0,
}
"""The least value of options that are numbers, whatever stage they belong to."""

_LARGEST_SEED = 2**32 - 1

_INPUTS = ("model", "artifact", "directory")  # positional on the command line


def stage_function(name: str) -> Callable[[Any, Common], str]:
    """The function that runs a stage; it returns the path of what was written, as given."""
    return getattr(_module(name), STAGES[name][1])


def make_options(name: str, values: Mapping[str, Any]) -> Any:
    """The options of a stage from values by field name. None stands for the default; a list becomes a tuple.

    Raises `UsageError` for a number below the least one that makes sense, and what the options class itself refuses.
    """
    options = getattr(_module(name), STAGES[name][0])
    given = {}
    for key, value in values.items():
        if value is not None and key in _LEAST and not value >= _LEAST[key]:
            raise UsageError(
                f"{value} is too small", where=f"--{key.replace('_', '-')}", fix=f"Give {_LEAST[key]} or more"
            )
        if key == "seed" and value is not None and value > _LARGEST_SEED:
            raise UsageError(f"{value} is too large", where="--seed", fix=f"Give at most {_LARGEST_SEED}")
        if key == "metrics" and value is not None:  # one option `--metrics a,b`, or a list in a recipe
            parts = [value] if isinstance(value, str) else value
            given[key] = tuple(metric.strip() for part in parts for metric in part.split(",") if metric.strip())
        elif value is not None:
            given[key] = tuple(value) if isinstance(value, list) else value
    return options(**given)


def option_types(name: str) -> dict[str, type]:
    """Long option, without dashes in front, to its type as recipes take it: str, int, float, bool or list."""
    options = getattr(_module(name), STAGES[name][0])
    hints = typing.get_type_hints(options)
    return {
        field.name.replace("_", "-"): _plain(hints[field.name])
        for field in dataclasses.fields(options)
        if field.name not in _INPUTS
    }


def _plain(hint: Any) -> type:
    """`int | None` is an int, `tuple[str, ...]` a list."""
    if isinstance(hint, types.UnionType):
        hint = next(each for each in typing.get_args(hint) if each is not type(None))
    return list if typing.get_origin(hint) is tuple else hint


def _module(name: str) -> types.ModuleType:
    return import_module(f"dqtool.stages.{name}")

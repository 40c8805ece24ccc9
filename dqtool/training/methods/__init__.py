"""Training methods of `distill --method`, one file each. torch is imported only when a method trains.

A method is a module of this package with a constant `METHOD`. Its `train(task, options, bars)` changes `task.student`
in place and returns metrics. Code that methods share is in `dqtool.training` (`block_loop.py`, `network_loop.py`).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.errors import UsageError

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask

__all__ = ["METHODS", "Method", "method_of", "method_options"]


def _as_given(options: Any, _given: JsonObject) -> Any:
    """Return the options unchanged."""
    return options


@dataclass(frozen=True)
class Method:
    """Training method.

    Attributes:
        summary: one line for help and plans.
        options: frozen dataclass whose defaults hold for every model; the manifest records all of it.
        train: function (task, options, bars) that trains `task.student` in place and returns metrics.
        work: function (options, number of blocks) that returns the iterations in words.
        by_blocks: blocks are trained one after another, so that a subset can be chosen.
        at_once: blocks can be trained by different processes at once (`distill --parallel-blocks`).
        corrects_predictions: `distill --correct-noise` is the default after training (not for samplers that extrapolate).
        derive: function (options, given) that returns the options that follow from those the user gave.
    """

    name: str
    summary: str
    options: type
    train: Callable[[DistillationTask, Any, Bars], dict[str, Json]]
    work: Callable[[Any, int], str]
    by_blocks: bool = False
    at_once: bool = False
    corrects_predictions: bool = False
    derive: Callable[[Any, JsonObject], Any] = _as_given


def method_of(name: str) -> Method:
    """Return the method of this name.

    Raises:
        UsageError: there is none.
    """
    if name not in METHODS:
        raise UsageError(f"unknown method '{name}'", where="--method", fix=f"Choose from {', '.join(METHODS)}")
    return METHODS[name]


def method_options(method: Method, given: JsonObject) -> Any:
    """Return the method's options with the given values in place of defaults; None stands for the default.

    Raises:
        UsageError: something was given that the method has no use for.
    """
    known = {field.name for field in fields(method.options)}
    told = {key: value for key, value in given.items() if value is not None}
    for key in told:
        if key not in known:
            raise UsageError(
                f"--method {method.name} has no use for this option",
                where=f"--{key.replace('_', '-')}",
                fix="Leave it out",
            )
    return method.derive(replace(method.options(), **told), told)


def _found() -> dict[str, Method]:
    """Import every module of this package and return its method by name."""
    modules = [import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    methods = sorted((module.METHOD for module in modules), key=lambda m: (m.name != "bkd", m.name))
    return {method.name: method for method in methods}


METHODS: dict[str, Method] = {}
"""All methods by name; `bkd`, the default, comes first."""
METHODS.update(_found())

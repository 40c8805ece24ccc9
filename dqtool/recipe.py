"""Recipes: a YAML file with a model and, for each stage, the long options of that stage's command."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtool.errors import UsageError
from dqtool.yamltree import compose, convert, entries, listed, nearest, read_text, text_of

__all__ = ["Recipe", "load_recipe"]

_TOP_LEVEL = ("model", "preset", "stages", "title", "description")

Options = Mapping[str, Mapping[str, type]]


@dataclass(frozen=True)
class Recipe:
    """Checked recipe. `stages` holds (stage, {long option without dashes: value}) in order."""

    model: str  # path as given, relative to the working directory
    stages: list[tuple[str, dict[str, Any]]]
    name: str
    path: Path
    title: str | None = None
    description: str | None = None
    preset: str | None = None
    """Preset of the whole recipe, from which each stage takes the options that it does not set itself."""


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str], options: Options) -> Recipe:
    """Read a recipe and apply `--set` overrides (`stage.option=value` or `model=value`, with the value as YAML).

    Args:
        options: for each stage, in order, the type of each long option: str, int, float, bool, or list for a repeatable
            one. Values of other types are passed on as text.

    Raises:
        EnvironmentFault: the file does not exist.
        UsageError: the syntax, a key, a stage, an option or the type of a value is wrong; the error names the line and
            the nearest valid name.
    """
    given = os.fspath(path)
    root = compose(read_text(path), given)
    top = entries(root, given, _TOP_LEVEL, "key") if root is not None else {}
    texts = {key: text_of(node, f"{given}:{line}", key) for key, (line, node) in top.items() if key != "stages"}
    stages: dict[str, dict[str, Any]] = {}
    if "stages" in top:
        _, node = top["stages"]
        for stage, (stage_line, stage_node) in entries(node, given, tuple(options), "stage").items():
            _check_order(stage, list(stages), tuple(options), f"{given}:{stage_line}")
            stages[stage] = {
                option: convert(value, options[stage][option], f"{given}:{value_line}", option)
                for option, (value_line, value) in entries(
                    stage_node, given, tuple(options[stage]), f"option of {stage}"
                ).items()
            }
    for override in overrides:
        _apply(override, texts, stages, options)
    if not texts.get("model"):
        raise UsageError(
            "The recipe names no model",
            where=given,
            fix="Name one with --set model=MODEL, or add a line such as `model: zoo:digits-ddpm`",
        )
    if not stages:
        raise UsageError("The recipe names no stages", where=given, fix=f"Add `stages:` with {listed(tuple(options))}")
    return Recipe(
        model=texts["model"],
        stages=list(stages.items()),
        name=Path(path).stem,
        path=Path(path),
        title=texts.get("title"),
        description=texts.get("description"),
        preset=texts.get("preset"),
    )


def _check_order(stage: str, before: Sequence[str], order: Sequence[str], where: str) -> None:
    """Check that a stage follows the stages before it."""
    for earlier in before:
        if order.index(earlier) > order.index(stage):
            raise UsageError(
                f"The stage {stage} can not follow {earlier}", where=where, fix=f"The order is {listed(order)}"
            )


def _apply(override: str, texts: dict[str, str], stages: dict[str, dict[str, Any]], options: Options) -> None:
    """Apply one `--set` override."""
    where = f"--set {override}"
    key, equals, value = override.partition("=")
    if not equals:
        raise UsageError(
            "A --set needs a value", where=where, fix="Write --set stage.option=value or --set model=value"
        )
    node = compose(value, where)
    if node is None:
        raise UsageError("A --set needs a value", where=where, fix="Write something after the equals sign")
    if key in ("model", "preset"):
        texts[key] = text_of(node, where, key)
        return
    stage, dot, option = key.partition(".")
    if not dot:
        raise UsageError(f"Unknown key: {key}", where=where, fix="Write --set stage.option=value or --set model=value")
    if stage not in options:
        raise UsageError(f"Unknown stage: {stage}", where=where, fix=nearest(stage, options))
    if stage not in stages:
        raise UsageError(f"The recipe has no stage {stage}", where=where, fix=f"It has {listed(list(stages))}")
    if option not in options[stage]:
        raise UsageError(f"Unknown option of {stage}: {option}", where=where, fix=nearest(option, options[stage]))
    stages[stage][option] = convert(node, options[stage][option], where, option)

"""Recipes: a YAML file that names a model and, stage by stage, the long options of that stage's command."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from yaml.nodes import Node

__all__ = ["STAGE_ORDER", "Recipe", "load_recipe"]

STAGE_ORDER = ("dilate", "calibrate", "distill", "export", "eval")

_TOP_LEVEL = ("model", "stages", "title", "description")
_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list of texts"}

Options = Mapping[str, Mapping[str, type]]


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `stages` holds (stage, {option as on the command line, without dashes in front: value})."""

    model: str  # as given: a relative path is relative to the working directory
    stages: list[tuple[str, dict[str, Any]]]
    name: str
    path: Path
    title: str | None = None
    description: str | None = None


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str], options: Options) -> Recipe:
    """Read a recipe and apply `--set` overrides (`stage.option=value` or `model=value`, the value read as YAML).

    `options` says, per stage, the type of each long option: str, int, float, bool, or list for one that may be
    repeated; any other type is passed on as text. Raises `EnvironmentFault` when there is no such file; `UsageError`
    with the line and the nearest valid name for everything a recipe does not know: syntax, keys, stages out of order
    or twice, options, and values of another type.
    """
    given = os.fspath(path)
    root = _compose(_read(path), given)
    top = _entries(root, given, _TOP_LEVEL, "key") if root is not None else {}
    texts = {key: _text(node, f"{given}:{line}", key) for key, (line, node) in top.items() if key != "stages"}
    stages: dict[str, dict[str, Any]] = {}
    if "stages" in top:
        _, node = top["stages"]
        for stage, (stage_line, stage_node) in _entries(node, given, tuple(options), "stage").items():
            _check_order(stage, list(stages), f"{given}:{stage_line}")
            stages[stage] = {
                option: _convert(value, options[stage][option], f"{given}:{value_line}", option)
                for option, (value_line, value) in _entries(
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
        raise UsageError("The recipe names no stages", where=given, fix=f"Add `stages:` with {_listed(STAGE_ORDER)}")
    return Recipe(
        model=texts["model"],
        stages=list(stages.items()),
        name=Path(path).stem,
        path=Path(path),
        title=texts.get("title"),
        description=texts.get("description"),
    )


def _read(path: str | os.PathLike[str]) -> str:
    given = os.fspath(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EnvironmentFault("There is no such recipe", where=given, fix="Check the path") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError("This is no recipe: a YAML text file is needed", where=given) from error
    except OSError as error:
        raise EnvironmentFault(f"The recipe can not be read: {error.strerror}", where=given) from error


def _compose(text: str, given: str) -> Node | None:
    """The tree of the one YAML document in `text`, with the line of every node."""
    import yaml

    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{given}:{mark.line + 1}" if mark else given
        raise UsageError(f"This is no valid YAML: {error.problem or error.context}", where=where) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"This is no valid YAML: {error.reason}", where=f"{given}:{line}") from error


def _entries(node: Node, given: str, known: Iterable[str], kind: str) -> dict[str, tuple[int, Node]]:
    """Key -> (line, value node) of a mapping; an empty value is an empty mapping."""
    import yaml

    line = node.start_mark.line + 1
    if node.tag == _NULL:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(
            f"A mapping (`name: value` lines) is needed here, one line per {kind}", where=f"{given}:{line}"
        )
    found: dict[str, tuple[int, Node]] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        name = key.value if isinstance(key, yaml.ScalarNode) else "?"
        if name not in known:
            raise UsageError(f"Unknown {kind}: {name}", where=f"{given}:{line}", fix=_nearest(name, known))
        if name in found:
            raise UsageError(f"{name} is given twice, first on line {found[name][0]}", where=f"{given}:{line}")
        found[name] = (line, value)
    return found


def _check_order(stage: str, before: Sequence[str], where: str) -> None:
    if stage not in STAGE_ORDER:
        return
    for earlier in before:
        if earlier in STAGE_ORDER and STAGE_ORDER.index(earlier) > STAGE_ORDER.index(stage):
            raise UsageError(
                f"The stage {stage} can not follow {earlier}", where=where, fix=f"The order is {_listed(STAGE_ORDER)}"
            )


def _apply(override: str, texts: dict[str, str], stages: dict[str, dict[str, Any]], options: Options) -> None:
    where = f"--set {override}"
    key, equals, value = override.partition("=")
    if not equals:
        raise UsageError(
            "A --set needs a value", where=where, fix="Write --set stage.option=value or --set model=value"
        )
    node = _compose(value, where)
    if node is None:
        raise UsageError("A --set needs a value", where=where, fix="Write something after the equals sign")
    if key == "model":
        texts["model"] = _text(node, where, "model")
        return
    stage, dot, option = key.partition(".")
    if not dot:
        raise UsageError(f"Unknown key: {key}", where=where, fix="Write --set stage.option=value or --set model=value")
    if stage not in options:
        raise UsageError(f"Unknown stage: {stage}", where=where, fix=_nearest(stage, options))
    if stage not in stages:
        raise UsageError(f"The recipe has no stage {stage}", where=where, fix=f"It has {_listed(list(stages))}")
    if option not in options[stage]:
        raise UsageError(f"Unknown option of {stage}: {option}", where=where, fix=_nearest(option, options[stage]))
    stages[stage][option] = _convert(node, options[stage][option], where, option)


def _convert(node: Node, kind: type, where: str, name: str) -> Any:
    """The value of an option's node as `kind`; `UsageError` when it is of another type."""
    import yaml

    if kind is list:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [_text(item, where, name, "a list of texts") for item in items]
    if kind not in (bool, int, float):
        return _text(node, where, name)
    try:
        value = yaml.SafeLoader("").construct_object(node) if isinstance(node, yaml.ScalarNode) else None
    except (yaml.YAMLError, ValueError):  # an unknown tag, or text under the tag of a number
        value = None
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
        except ValueError:
            value = None
    if type(value) is not kind:
        raise _mismatch(node, where, name, _WORDS[kind])
    return value


def _text(node: Node, where: str, name: str, wanted: str = "a text") -> str:
    """A scalar as it is written: `8`, `4/4`, `cuda:0` are all texts where the command takes one."""
    import yaml

    if not isinstance(node, yaml.ScalarNode) or node.tag in (_NULL, _BOOL):
        raise _mismatch(node, where, name, wanted)
    return str(node.value)


def _mismatch(node: Node, where: str, name: str, wanted: str) -> UsageError:
    found = repr(node.value) if isinstance(node.value, str) and node.value else "nothing"
    if not isinstance(node.value, str):
        found = "a list or mapping"
    return UsageError(f"{name} needs {wanted}, and {found} is given", where=where)


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    close = difflib.get_close_matches(name.strip("-").replace("_", "-"), known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}? Valid: {_listed(known)}" if close else f"Valid: {_listed(known)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)

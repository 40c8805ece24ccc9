"""YAML with the line of everything in it: what recipes and tables are read with, so that each fault names its line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from yaml.nodes import Node

__all__ = ["compose", "convert", "entries", "items", "listed", "nearest", "read_text", "text_of"]

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list of texts"}


def read_text(path: str | os.PathLike[str], what: str = "recipe") -> str:
    """The file's text; `EnvironmentFault` when there is none, `UsageError` when it is no text."""
    given = os.fspath(path)
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise EnvironmentFault(f"There is no such {what}", where=given, fix="Check the path") from error
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"This is no {what}: a YAML text file is needed", where=given) from error
    except OSError as error:
        raise EnvironmentFault(f"The {what} can not be read: {error.strerror}", where=given) from error


def compose(text: str, given: str) -> Node | None:
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


def entries(node: Node, given: str, known: Iterable[str], kind: str) -> dict[str, tuple[int, Node]]:
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
            raise UsageError(f"Unknown {kind}: {name}", where=f"{given}:{line}", fix=nearest(name, known))
        if name in found:
            raise UsageError(f"{name} is given twice, first on line {found[name][0]}", where=f"{given}:{line}")
        found[name] = (line, value)
    return found


def items(node: Node, given: str, what: str) -> list[Node]:
    """The entries of a list; `UsageError` when it is none."""
    import yaml

    if not isinstance(node, yaml.SequenceNode):
        raise UsageError(f"{what} needs a list (`- ` lines)", where=f"{given}:{node.start_mark.line + 1}")
    return list(node.value)


def convert(node: Node, kind: type, where: str, name: str) -> Any:
    """The value of an option's node as `kind`; `UsageError` when it is of another type."""
    import yaml

    if kind is list:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [text_of(item, where, name, "a list of texts") for item in items]
    if kind not in (bool, int, float):
        return text_of(node, where, name)
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


def text_of(node: Node, where: str, name: str, wanted: str = "a text") -> str:
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


def nearest(name: str, known: Iterable[str]) -> str:
    """Which valid name was probably meant."""
    known = list(known)
    close = difflib.get_close_matches(name.strip("-").replace("_", "-"), known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}? Valid: {listed(known)}" if close else f"Valid: {listed(known)}"


def listed(names: Iterable[str]) -> str:
    """Names one after the other."""
    return ", ".join(names)

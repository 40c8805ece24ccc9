"""YAML with line numbers, for recipes and tables whose errors name the line.

PyYAML parses; its plain loader drops the lines, so that nodes are converted here.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.reading import read_text_file
from dqtool.errors import DqtoolError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    from yaml.nodes import Node, ScalarNode

__all__ = ["compose", "convert", "entries", "items", "listed", "nearest", "plain_value", "read_text", "text_of"]

_NULL = "tag:yaml.org,2002:null"
_BOOL = "tag:yaml.org,2002:bool"
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_TEXT = "tag:yaml.org,2002:str"
_NO_TEXT = ("true", "false")
_BYTES = 64 << 10
_NODES = 20_000
_DEPTH = 32
_NUMBER_LENGTH = 64
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", list: "a list of texts"}


def read_text(path: str | os.PathLike[str], what: str = "recipe", fault: type[DqtoolError] = UsageError) -> str:
    """Return the text of a YAML file of at most 64 KiB.

    Raises:
        DqtoolError: the file is larger, not text, or not a regular file; the class is `fault`.
        EnvironmentFault: the file does not exist or can't be read.
    """
    if not os.path.exists(path) and "\0" not in os.fspath(path):
        raise EnvironmentFault(f"There is no such {what}", where=os.fspath(path), fix="Check the path")
    try:
        return read_text_file(path, _BYTES, fault)
    except fault as error:
        raise fault(f"This is no {what}: a YAML text file is needed. {error.what}", where=error.where) from error


def compose(text: str, given: str) -> Node | None:
    """Return the tree of the YAML document in `text`, with the line of every node; None for an empty document.

    Raises:
        UsageError: the text is not valid YAML, or has more than 20,000 parts, 32 levels, or aliases that repeat more
            than that.
    """
    import yaml

    try:
        _check_events(yaml.parse(text, Loader=yaml.SafeLoader), given)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            _count(root, given, {})
        return root
    except (ValueError, OverflowError) as error:  # a character's number that there is none of
        raise UsageError(f"This is no valid YAML: {error}", where=given) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{given}:{mark.line + 1}" if mark else given
        raise UsageError(f"This is no valid YAML: {error.problem or error.context}", where=where) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"This is no valid YAML: {error.reason}", where=f"{given}:{line}") from error


def entries(node: Node, given: str, known: Iterable[str], kind: str) -> dict[str, tuple[int, Node]]:
    """Return key -> (line, value node) of a mapping; an empty value counts as an empty mapping.

    Raises:
        UsageError: the node is not a mapping, or a key is unknown or repeated.
    """
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
    """Return the entries of a list.

    Raises:
        UsageError: the node is not a list.
    """
    import yaml

    if not isinstance(node, yaml.SequenceNode):
        raise UsageError(f"{what} needs a list (`- ` lines)", where=f"{given}:{node.start_mark.line + 1}")
    return list(node.value)


def convert(node: Node, kind: type, where: str, name: str) -> Any:
    """Return the value of an option's node as `kind`.

    Raises:
        UsageError: the value has another type.
    """
    import yaml

    if kind is list:
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        return [text_of(item, where, name, "a list of texts") for item in items]
    if kind not in (bool, int, float):
        return text_of(node, where, name)
    value = None
    if isinstance(node, yaml.ScalarNode):
        value = _scalar(node) if kind is bool else _number(node, kind)
    if type(value) is not kind:
        raise _mismatch(node, where, name, _WORDS[kind])
    return value


def plain_value(node: Node | None) -> Any:
    """Return a tree as dicts, lists, texts and numbers; a scalar that does not fit its tag becomes text."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return {key.value: plain_value(value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    if isinstance(node, yaml.SequenceNode):
        return [plain_value(item) for item in node.value]
    if node is None:
        return None
    value = _scalar(node)
    return node.value if value is None and node.tag != _NULL else value


def _scalar(node: Node) -> Any:
    """Return a scalar as PyYAML reads it; None if it can't be read, and for numbers in base 60 (`1:30`)."""
    import yaml

    if node.tag in _NUMBERS and (":" in node.value or len(node.value) > _NUMBER_LENGTH):
        return None
    try:
        return yaml.SafeLoader("").construct_object(node)
    except Exception:  # PyYAML's constructors raise whatever Python does on a wrong text: IndexError for an empty !!int
        return None


def _number(node: ScalarNode, kind: type) -> Any:
    """Return a scalar as the command line reads an int or float (`kind`), else as YAML does; None if neither can.

    YAML 1.1 reads 010 as 8, and 1e-4, without a point, as text.
    """
    if node.tag not in (*_NUMBERS, _TEXT) or len(node.value) > _NUMBER_LENGTH:
        return None
    try:
        return kind(node.value)
    except ValueError:
        return _scalar(node)  # .inf, 0x10


def _check_events(events: Iterable[Any], given: str) -> None:
    """Check a document for too many parts or levels, before anything is built from it.

    Raises:
        UsageError: the document is too large or too deep.
    """
    import yaml

    depth = 0
    for number, event in enumerate(events):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _DEPTH or number > _NODES:
            what = f"it is nested deeper than {_DEPTH} levels" if depth > _DEPTH else f"it has over {_NODES:,} parts"
            where = f"{given}:{event.start_mark.line + 1}"
            raise UsageError(f"This YAML is no honest file: {what}", where=where)


def _count(node: Node, given: str, known: dict[int, int]) -> int:
    """Return the number of nodes of a tree with its aliases expanded.

    Raises:
        UsageError: there are too many, or an alias contains itself.
    """
    import yaml

    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = _NODES  # met again within itself, it is endless
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_count(part, given, known) for part in parts)
    if known[id(node)] > _NODES:
        where = f"{given}:{node.start_mark.line + 1}"
        raise UsageError("This YAML is no honest file: its aliases repeat too much", where=where)
    return known[id(node)]


def text_of(node: Node, where: str, name: str, wanted: str = "a text") -> str:
    """Return a scalar as it is written: `8`, `4/4`, `off` and `cuda:0` are texts where the command expects text.

    YAML 1.1 has on, off, yes and no for booleans, and commands have them for choices.

    Raises:
        UsageError: the node is not a scalar, or is null, true or false.
    """
    import yaml

    if not isinstance(node, yaml.ScalarNode):
        raise _mismatch(node, where, name, wanted)
    if node.tag == _NULL or (node.tag == _BOOL and node.value.lower() in _NO_TEXT):
        fix = "Leave it out, or put it into quotes if it is meant as a word" if node.value else None
        raise _mismatch(node, where, name, wanted, fix)
    return str(node.value)


def _mismatch(node: Node, where: str, name: str, wanted: str, fix: str | None = None) -> UsageError:
    found = repr(node.value) if isinstance(node.value, str) and node.value else "nothing"
    if not isinstance(node.value, str):
        found = "a list or mapping"
    return UsageError(f"{name} needs {wanted}, and {found} is given", where=where, fix=fix)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return advice that names the most similar valid name, and all valid names."""
    known = list(known)
    close = difflib.get_close_matches(name.strip("-").replace("_", "-"), known, n=1, cutoff=0.5)
    return f"Did you mean {close[0]}? Valid: {listed(known)}" if close else f"Valid: {listed(known)}"


def listed(names: Iterable[str]) -> str:
    """Return names separated by commas."""
    return ", ".join(names)

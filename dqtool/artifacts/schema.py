"""Checking plain JSON values against types: those of a record's fields, or of a function's parameters. Imports no torch.

`find_mismatch` understands `None`, `bool`, `int`, `float`, `str`, `Any`, unions, `Literal`, lists and tuples, dicts, frozen
dataclasses (records) and `Annotated[kind, Bounds(...)]` or `OneOf`. Numbers are always finite. `record` makes a record of
an object.

A validation library would be one more dependency for these few kinds. Here keys without a field are kept and written again,
and `dqtool --help` stays fast.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

from dqtool.artifacts.jsonvalues import Json, JsonObject

__all__ = [
    "Bounds",
    "Count",
    "Mismatch",
    "Name",
    "OneOf",
    "Record",
    "Size",
    "Step",
    "find_mismatch",
    "json_of",
    "record",
    "unchecked",
    "without",
]

R = TypeVar("R")


@dataclass(frozen=True)
class Mismatch:
    """Mismatch of a value: the key of the innermost wrong one, and the requirement that it fails."""

    key: str
    what: str


@dataclass(frozen=True)
class Record:
    """Base of records whose objects are written again: keys that no field names are kept.

    Attributes:
        as_read: the object that the record was made of; empty for one that was made in code.
    """

    written: ClassVar[frozenset[str]] = frozenset()
    """Fields that are written though they have their default's value."""

    as_read: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)

    def to_json(self) -> dict[str, Json]:
        """Return the object that stands for the record: what was read, with every field's value.

        A field at its default is left out, unless it was read or is one of `written`.
        """
        found: dict[str, Json] = dict(self.as_read)
        kind: Any = type(self)
        for name, own in _fields(kind).items():
            value = getattr(self, name)
            if own.needed or own.key in found or name in self.written or value != own.default:
                found[own.key] = json_of(value)
        return found


S = TypeVar("S", bound=Record)


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, or of a text's or list's length."""

    least: float = -math.inf
    most: float = math.inf

    def words(self, unit: str) -> str:
        """Return the bounds in words."""
        if self.most == math.inf:
            return f"of {self.least:g} or more{unit}"
        if self.least == -math.inf:
            return f"of {self.most:g} or less{unit}"
        return f"from {self.least:g} to {self.most:g}{unit}"


@dataclass(frozen=True)
class OneOf:
    """The values that a number or text may have."""

    values: tuple[Any, ...]


Count = Annotated[int, Bounds(0, 1 << 53)]
Size = Annotated[int, Bounds(1, 1 << 40)]
Step = Annotated[int, Bounds(1, 100_000)]
Name = Annotated[str, Bounds(1, 1_000)]

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def find_mismatch(value: Any, kind: Any, key: str = "") -> Mismatch | None:
    """Return the first thing that is wrong with a JSON value of this type, or None."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _finite(value, key)
    if origin is Annotated:
        found = find_mismatch(value, arguments[0], key)
        return found or next(
            (wrong for each in arguments[1:] if (wrong := _bounded(value, each, key)) is not None), None
        )
    if origin in (Union, types.UnionType):
        return _of_union(value, arguments, key)
    if origin is Literal:
        return None if value in arguments and not isinstance(value, bool) else Mismatch(key, _words(kind))
    if kind in _WORDS or kind is None:
        return _of_scalar(value, kind, key)
    container = origin or kind
    if dataclasses.is_dataclass(container) and isinstance(container, type):
        return _of_record(value, container, key)
    if container in (dict, Mapping):
        if not isinstance(value, Mapping):
            return Mismatch(key, _words(kind))
        inner = arguments[1] if len(arguments) == 2 else Any
        return next((found for k, v in value.items() if (found := find_mismatch(v, inner, _under(key, str(k))))), None)
    if container in (list, tuple, Sequence):
        return _of_list(value, kind, arguments, key)
    return Mismatch(key, _words(kind))  # a class that no JSON value is of


def record(value: Any, kind: type[R], key: str = "") -> R:
    """Return the record that an object of JSON stands for; keys that the record does not name are left out.

    Raises `ValueError` whose argument is the `Mismatch`.
    """
    found = find_mismatch(value, kind, key)
    if found is not None:
        raise ValueError(found)
    result: R = _built(value, kind)
    return result


def unchecked(value: JsonObject, kind: type[R]) -> R:
    """Return the record that an object of JSON stands for, as dqtool itself made it."""
    made: R = _built(value, kind)
    return made


def without(record: S, name: str) -> S:
    """Return the record with the field `name` at its default and its key left out."""
    kind: Any = type(record)
    own = _fields(kind)[name]
    kept = {key: value for key, value in record.as_read.items() if key != own.key}
    return dataclasses.replace(record, as_read=kept, **{name: own.default})


def json_of(value: Any) -> Any:
    """Return the JSON value of a record, of a dataclass, or of containers of them."""
    if isinstance(value, Record):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {own.name: json_of(getattr(value, own.name)) for own in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: json_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_of(item) for item in value]
    return value


def _built(value: Any, kind: Any) -> Any:
    """Return the value with records in the place of their objects, and tuples in that of lists where the type says so."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _built(value, arguments[0])
    if origin in (Union, types.UnionType):
        fitting = next((each for each in arguments if find_mismatch(value, each) is None), None)
        if fitting is None and isinstance(value, Mapping):  # an object that was not checked
            fitting = next((each for each in arguments if dataclasses.is_dataclass(each)), Any)
        return _built(value, Any if fitting is None else fitting)
    container = origin or kind
    if isinstance(container, type) and dataclasses.is_dataclass(container):
        if isinstance(value, container):
            return value
        given = {name: _built(value[own.key], own.kind) for name, own in _fields(container).items() if own.key in value}
        if issubclass(container, Record):
            given["as_read"] = value
        return container(**given)
    if container in (dict, Mapping) and len(arguments) == 2:
        return {name: _built(item, arguments[1]) for name, item in value.items()}
    if container is list and arguments:
        return [_built(item, arguments[0]) for item in value]
    if container is tuple and arguments:
        inner = arguments[:1] * len(value) if arguments[1:] in ((), (...,)) else arguments
        return tuple(_built(item, each) for item, each in zip(value, inner, strict=True))
    return value


@dataclass(frozen=True)
class _Field:
    """A field of a record: its type, whether it must be there, its key, and its default."""

    kind: Any
    needed: bool
    key: str
    default: Any


@functools.cache
def _fields(kind: Any) -> dict[str, _Field]:
    """Return a record's fields by name. `Annotated[kind, "key"]` gives a field another key."""
    hints = typing.get_type_hints(kind, include_extras=True)
    missing = dataclasses.MISSING
    found = {}
    for own in dataclasses.fields(kind):
        if own.name == "as_read":
            continue
        default = own.default_factory() if own.default_factory is not missing else own.default
        hint = hints[own.name]
        found[own.name] = _Field(hint, default is missing, _alias(hint) or own.name, default)
    return found


def _alias(kind: Any) -> str | None:
    if typing.get_origin(kind) is not Annotated:
        return None
    return next((each for each in typing.get_args(kind)[1:] if isinstance(each, str)), None)


def _of_record(value: Any, kind: type, key: str) -> Mismatch | None:
    if not isinstance(value, Mapping):
        return Mismatch(key, "an object")
    for own in _fields(kind).values():
        if own.key not in value:
            if own.needed:
                return Mismatch(_under(key, own.key), "there: the key is missing")
            continue
        found = find_mismatch(value[own.key], own.kind, _under(key, own.key))
        if found is not None:
            return found
    return None


def _of_scalar(value: Any, kind: Any, key: str) -> Mismatch | None:
    if kind is None or kind is type(None):
        return None if value is None else Mismatch(key, "null")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return None if abs(value) < 1 << 1000 else Mismatch(key, "a finite number")
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        return Mismatch(key, _WORDS[kind])
    return _finite(value, key)


def _of_union(value: Any, kinds: Sequence[Any], key: str) -> Mismatch | None:
    found = [find_mismatch(value, each, key) for each in kinds]
    if None in found:
        return None
    deeper = [each for each in found if each is not None and each.key != key]
    return deeper[0] if deeper else Mismatch(key, " or ".join(dict.fromkeys(_words(each) for each in kinds)))


def _of_list(value: Any, kind: Any, arguments: Sequence[Any], key: str) -> Mismatch | None:
    if not isinstance(value, list | tuple):
        return Mismatch(key, _words(kind))
    fixed = typing.get_origin(kind) is tuple and len(arguments) > 1 and arguments[-1] is not ...
    if fixed and len(value) != len(arguments):
        return Mismatch(key, f"a list of {len(arguments)}")
    inner: Sequence[Any] = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
    for number, (item, each) in enumerate(zip(value, inner, strict=True)):
        found = find_mismatch(item, each, f"{key}[{number}]")
        if found is not None:
            return found
    return None


def _bounded(value: Any, bounds: Any, key: str) -> Mismatch | None:
    if isinstance(bounds, OneOf):
        return None if value in bounds.values else Mismatch(key, f"one of {', '.join(map(str, bounds.values))}")
    if not isinstance(bounds, Bounds):
        return None
    size, unit = value, ""
    if isinstance(value, str):
        size, unit = len(value), " characters"
    elif isinstance(value, list | tuple | Mapping):
        size, unit = len(value), " items"
    if isinstance(size, bool) or not isinstance(size, int | float) or bounds.least <= size <= bounds.most:
        return None
    what = {"": "a number", " characters": "a text"}.get(unit, "a list")
    return Mismatch(key, f"{what} {bounds.words(unit)}")


def _finite(value: Any, key: str) -> Mismatch | None:
    if isinstance(value, float):
        return None if math.isfinite(value) else Mismatch(key, "a finite number")
    if isinstance(value, Mapping):
        return next((found for k, v in value.items() if (found := _finite(v, _under(key, str(k))))), None)
    if isinstance(value, list | tuple):
        return next((found for i, v in enumerate(value) if (found := _finite(v, f"{key}[{i}]"))), None)
    return None


def _under(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return _words(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(each) for each in arguments))
    container = origin or kind
    if container in (list, tuple, Sequence):
        return "a list"
    if container in (dict, Mapping) or dataclasses.is_dataclass(container):
        return "an object"
    return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))

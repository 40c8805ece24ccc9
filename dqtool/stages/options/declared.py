"""Declarations of a stage's options: made once, as the annotated fields of a dataclass.

    steps: Annotated[int, Option("Sampling steps the quantized model will take.", "N", least=1)] = 20

The command line, recipes, tables and bounds are all derived from such a class, for stages and for all other commands. This
module imports nothing heavy, because `dqtool --help` imports it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dqtool.errors import UsageError

__all__ = [
    "GENERAL",
    "INPUT",
    "QUALITY",
    "RESOURCES",
    "Declared",
    "Option",
    "build_options",
    "check_values",
    "declared_options",
]

INPUT, QUALITY, RESOURCES, GENERAL = "Input and output", "Quality", "Resources", "General"
"""Panels of a command's help."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]")


@dataclasses.dataclass(frozen=True)
class Option:
    """The declaration of one option.

    Attributes:
        help: a sentence on what the option does, and when one would change it. `{MODULE:NAME}` in it stands for the names
            that this dictionary or tuple holds; it is read when the help is shown.
        metavar: the placeholder of the value in the help, `N`.
        least: the smallest number that is accepted.
        most: the largest number that is accepted.
        short: a second name, `-o`.
        flag: the name as it is typed, if it differs from that of the field: `--set`.
        positional: the option is an argument of the command. Recipes fill it in by themselves.
        separated: a tuple is given as one text, `a,b`.
        hidden: the help does not show the option.
        show_default: the help shows the default.
        panel: the part of the help that shows the option.
    """

    help: str
    metavar: str | None = None
    _: dataclasses.KW_ONLY
    least: float | None = None
    most: float | None = None
    short: str | None = None
    flag: str | None = None
    positional: bool = False
    separated: bool = False
    hidden: bool = False
    show_default: bool = True
    panel: str = QUALITY


@dataclasses.dataclass(frozen=True)
class Declared:
    """An option with the name, type and default of its field.

    `kind` is str, int, float, bool or, for a tuple, list; `item` is the type of a tuple's items, or `kind`. `optional` options
    may be None. `default` is `dataclasses.MISSING` if the option must be given.
    """

    name: str
    kind: type
    item: type
    optional: bool
    default: Any
    option: Option

    @property
    def long(self) -> str:
        """Name of the option as it is typed, `--batch-size`."""
        return self.option.flag or f"--{self.name.replace('_', '-')}"

    def check(self, value: float) -> None:
        """Raise `UsageError` for a number that is out of bounds."""
        least, most = self.option.least, self.option.most
        if least is not None and not value >= least:
            raise UsageError(f"{value} is too small", where=self.long, fix=f"Give {least} or more")
        if most is not None and value > most:
            raise UsageError(f"{value} is too large", where=self.long, fix=f"Give at most {most}")


@functools.cache
def declared_options(options: type) -> tuple[Declared, ...]:
    """Return the options that a dataclass declares, in the order of its fields.

    Raises:
        TypeError: a field is not annotated with an `Option`.
    """
    hints = typing.get_type_hints(options, include_extras=True)
    return tuple(_declared(field, hints[field.name]) for field in dataclasses.fields(options))


def build_options(options: type, values: Mapping[str, Any]) -> Any:
    """Build the options of a command from values by field name. None stands for the default; a list becomes a tuple.

    Raises:
        UsageError: a value is out of bounds or can't be read, or the options class refuses it.
    """
    check_values(values)
    declared = {each.name: each for each in declared_options(options)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in declared:
            value = _converted(declared[name], value)
        given[name] = value
    return options(**given)


def check_values(values: Mapping[str, Any]) -> None:
    """Check options by name, wherever they come from: numbers are finite, texts are without NUL, outputs one line each.

    Raises:
        UsageError: names the option.
    """
    for name, value in values.items():
        where = f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{value} is no number to work with", where=where, fix="Give a finite number")
        if type(value) is int and abs(value) >= 1 << 62:
            raise UsageError("This whole number is too large", where=where, fix="Give one below 2^62")
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and "\0" in text:
                raise UsageError("This text holds a NUL character", where=where)
        if name == "output" and isinstance(value, str) and _CONTROL.search(value):
            raise UsageError(
                "The name of an output is passed on in one line, and this one holds a control character",
                where=where,
                fix="Choose another name",
            )


def _converted(declared: Declared, value: Any) -> Any:
    if declared.option.separated:  # one option `a,b`, or a list in a recipe
        parts = [value] if isinstance(value, str) else value
        value = [each.strip() for part in parts for each in str(part).split(",") if each.strip()]
        if declared.item is int:
            value = _whole_numbers(value, declared)
    if declared.item in (int, float):
        for number in value if declared.kind is list else [value]:
            declared.check(number)
    return tuple(value) if isinstance(value, list) else value


def _whole_numbers(texts: Sequence[str], declared: Declared) -> list[int]:
    """Return the numbers that the texts hold.

    Raises:
        UsageError: a text is not a whole number.
    """
    if not all(text.isdecimal() for text in texts):
        raise UsageError(
            f"'{','.join(texts)}' is not a list of whole numbers", where=declared.long, fix="Example: 1,4,16"
        )
    return [int(text) for text in texts]


def _declared(field: dataclasses.Field[Any], hint: Any) -> Declared:
    plain, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    option = next((note for note in notes if isinstance(note, Option)), None)
    if option is None:
        raise TypeError(f"the field {field.name} declares no option")
    optional = isinstance(plain, types.UnionType)
    if optional:
        plain = next(each for each in typing.get_args(plain) if each is not type(None))
    kind, item = (list, typing.get_args(plain)[0]) if typing.get_origin(plain) is tuple else (plain, plain)
    return Declared(field.name, kind, item, optional, field.default, option)

"""Declarations of a stage's options: made once, as the annotated fields of a dataclass.

    steps: Annotated[int, Option("Sampling steps the quantized model will take.", "N", least=1)] = 20

The command line, recipes, tables and bounds are all derived from such a class. This module imports nothing heavy,
because `dqtool --help` imports it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any

from dqtool.errors import UsageError

__all__ = ["INPUT", "QUALITY", "RESOURCES", "Declared", "Option", "declared_options", "make"]

INPUT, QUALITY, RESOURCES = "Input and output", "Quality", "Resources"
"""Panels of a command's help."""


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
    positional: bool = False
    separated: bool = False
    hidden: bool = False
    show_default: bool = True
    panel: str = QUALITY


@dataclasses.dataclass(frozen=True)
class Declared:
    """An option with the name, type and default of its field.

    `kind` is str, int, float, bool or, for a tuple, list. `optional` options may be None. `default` is
    `dataclasses.MISSING` if the option must be given.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    option: Option

    @property
    def long(self) -> str:
        """Name of the option as it is typed, `--batch-size`."""
        return f"--{self.name.replace('_', '-')}"

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


def make(options: type, values: Mapping[str, Any]) -> Any:
    """Build the options of a stage from values by field name. None stands for the default; a list becomes a tuple.

    Raises:
        UsageError: a number is out of bounds, or the options class refuses a value.
    """
    declared = {each.name: each for each in declared_options(options)}
    given: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in declared:
            value = _converted(declared[name], value)
        given[name] = value
    return options(**given)


def _converted(declared: Declared, value: Any) -> Any:
    if declared.kind in (int, float):
        declared.check(value)
    if declared.option.separated:  # one option `a,b`, or a list in a recipe
        parts = [value] if isinstance(value, str) else value
        return tuple(each.strip() for part in parts for each in part.split(",") if each.strip())
    return tuple(value) if isinstance(value, list) else value


def _declared(field: dataclasses.Field[Any], hint: Any) -> Declared:
    plain, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
    option = next((note for note in notes if isinstance(note, Option)), None)
    if option is None:
        raise TypeError(f"the field {field.name} declares no option")
    optional = isinstance(plain, types.UnionType)
    if optional:
        plain = next(each for each in typing.get_args(plain) if each is not type(None))
    kind = list if typing.get_origin(plain) is tuple else plain
    return Declared(field.name, kind, optional, field.default, option)

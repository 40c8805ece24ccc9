"""Matching of untrusted regular expressions with bounded work; Python's own engine may take exponential time.

Python parses a pattern, and this module matches it by sets of positions, so that no position is tried twice. It supports
what patterns of module names use: characters, classes, groups, alternatives, repeats and anchors. Back references and
lookaround are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

__all__ = ["Pattern", "Patterns"]

LONGEST = 1_000
"""Largest number of characters of a pattern."""
WORK = 200_000
"""Largest number of steps of one match, about a tenth of a second."""
TOTAL = 2_000_000
"""Largest number of steps of all matches of a file, about a second. A plain pattern's match counts as one."""

_CLASSES: dict[Any, Callable[[str], bool]] = {
    op.CATEGORY_DIGIT: str.isdecimal,
    op.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    op.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    op.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
    op.CATEGORY_SPACE: str.isspace,
    op.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
}
_PLAIN = re.compile(r"[\w.^-]*")
"""Form of patterns without repeats, which Python's engine matches in linear time."""


class Patterns:
    """Ordered patterns with a bound on the work of all matches together."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._left = TOTAL
        self._matchers: list[tuple[str, re.Pattern[str] | Pattern]] = []
        for text in texts:
            # PEFT's rule: a match may begin after any dot.
            whole = rf"(.*\.)?({text})"
            self._matchers.append((text, re.compile(whole) if _PLAIN.fullmatch(text) else Pattern(whole)))

    def first(self, name: str) -> str | None:
        """Return the first pattern that matches `name` whole or after a dot, or None.

        Raises:
            ValueError: the match takes too long.
        """
        for text, matcher in self._matchers:
            self._left -= 1
            found = matcher.fullmatch(name)
            if isinstance(matcher, Pattern):
                self._left -= matcher.spent
            if self._left < 0:
                raise ValueError("these regular expressions take too long to match")
            if found:
                return text
        return None


class Pattern:
    """A regular expression. Raises `ValueError` for invalid or unsupported patterns."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"a pattern of {len(text):,} characters is too long")
        try:
            self._items: Any = _parser.parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"this is no regular expression: {error}") from error
        self._left = WORK

    @property
    def spent(self) -> int:
        """Number of steps of the last match."""
        return WORK - self._left

    def fullmatch(self, text: str) -> bool:
        """Return whether all of `text` matches, as `re.fullmatch` does; `ValueError` where the match takes too long."""
        self._left = WORK
        try:
            return len(text) in self._after(self._items, text, {0})
        except RecursionError as error:
            raise ValueError("this regular expression is nested too deeply") from error

    def _after(self, items: Any, text: str, places: set[int]) -> set[int]:
        """Return all ends of matches of `items` that begin at one of `places`."""
        for kind, argument in items:
            self._spend(len(places) + 1)
            if not places:
                return places
            if kind is op.BRANCH:
                places = set().union(*(self._after(branch, text, places) for branch in argument[1]))
            elif kind is op.SUBPATTERN:
                if argument[1] or argument[2]:
                    raise ValueError("flags within a regular expression are not supported")
                places = self._after(argument[3], text, places)
            elif kind in (op.MAX_REPEAT, op.MIN_REPEAT):
                places = self._repeated(argument, text, places)
            elif kind is op.AT:
                places = {place for place in places if _anchored(argument, text, place)}
            else:
                places = {p + 1 for p in places if p < len(text) and self._matches(kind, argument, text[p])}
        return places

    def _repeated(self, argument: Any, text: str, places: set[int]) -> set[int]:
        least, most, items = argument
        for _ in range(int(least)):
            self._spend(1)
            again = self._after(items, text, places)
            if again == places:
                break
            places = again
        found, count = set(places), int(least)
        while places and count < int(most):
            places = self._after(items, text, places) - found
            found |= places
            count += 1
        return found

    def _matches(self, kind: Any, argument: Any, char: str) -> bool:
        if kind is op.LITERAL:
            return bool(ord(char) == argument)
        if kind is op.NOT_LITERAL:
            return bool(ord(char) != argument)
        if kind is op.ANY:
            return char != "\n"
        if kind is op.IN:
            self._spend(len(argument))
            negated = argument[0][0] is op.NEGATE
            return negated != any(self._matches(kind, inner, char) for kind, inner in argument if kind is not op.NEGATE)
        if kind is op.RANGE:
            return bool(argument[0] <= ord(char) <= argument[1])
        if kind is op.CATEGORY and argument in _CLASSES:
            return _CLASSES[argument](char)
        raise ValueError(f"{str(kind).lower()} in a regular expression is not supported")

    def _spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise ValueError("this regular expression takes too long to match")


def _anchored(where: Any, text: str, place: int) -> bool:
    if where in (op.AT_BEGINNING, op.AT_BEGINNING_STRING):
        return place == 0
    if where in (op.AT_END, op.AT_END_STRING):
        return place == len(text)
    if where in (op.AT_BOUNDARY, op.AT_NON_BOUNDARY):
        sides = [0 <= i < len(text) and (text[i].isalnum() or text[i] == "_") for i in (place - 1, place)]
        return (sides[0] != sides[1]) == (where is op.AT_BOUNDARY)
    raise ValueError("this anchor is not supported")

"""How lists are read from an option's text."""

from __future__ import annotations

from dqtool.errors import UsageError

__all__ = ["split_list", "split_numbers"]


def split_list(text: str) -> tuple[str, ...]:
    """`"a,b"` as ("a", "b"); "none" and nothing are ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "none"))


def split_numbers(text: str | None, where: str) -> tuple[int, ...]:
    """`"1,4"` as (1, 4); None is ().

    Raises:
        UsageError: something else than whole numbers.
    """
    parts = split_list(text or "")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"'{text}' is no list of whole numbers", where=where, fix="Example: 1,4,16")
    return tuple(map(int, parts))

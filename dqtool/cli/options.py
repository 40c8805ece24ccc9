"""Lists in the text of an option, `a,b`."""

from __future__ import annotations

from dqtool.errors import UsageError

__all__ = ["split_list", "split_numbers"]


def split_list(text: str) -> tuple[str, ...]:
    """Split `"a,b"` into ("a", "b"). The texts "none" and "" give ()."""
    return tuple(part.strip() for part in text.split(",") if part.strip() not in ("", "none"))


def split_numbers(text: str | None, where: str) -> tuple[int, ...]:
    """Split `"1,4"` into (1, 4). None gives ().

    Raises:
        UsageError: a part is not a whole number.
    """
    parts = split_list(text or "")
    if not all(part.isdecimal() for part in parts):
        raise UsageError(f"'{text}' is not a list of whole numbers", where=where, fix="Example: 1,4,16")
    return tuple(map(int, parts))

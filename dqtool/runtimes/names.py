"""Names of runtimes, earlier ones included."""

from __future__ import annotations

__all__ = ["EARLIER_NAMES", "runtime_name"]

EARLIER_NAMES = {"onednn": "cpu"}
"""Earlier names of runtimes. Command lines, recipes, reports and remembered choices may hold them."""


def runtime_name(given: str) -> str:
    """Return the present name of a runtime. Other words (`auto`, an unknown name) stay as they are."""
    return EARLIER_NAMES.get(given, given)

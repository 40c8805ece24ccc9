"""Names of runtimes, earlier ones included."""

from __future__ import annotations

__all__ = ["EARLIER_NAMES", "GPU", "runtime_name"]

GPU = "cuda"
"""The integer runtime of networks on CUDA devices. A network that is loaded on the CPU changes to it when it moves to one."""

EARLIER_NAMES = {"onednn": "cpu"}
"""Earlier names of runtimes. Command lines, recipes, reports and remembered choices may hold them."""


def runtime_name(given: str) -> str:
    """Return the present name of a runtime. Other words (`auto`, an unknown name) stay as they are."""
    return EARLIER_NAMES.get(given, given)

"""Memory use of a piece of work, as the kernel reports it. Linux only: nothing is measured on other systems."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

__all__ = ["MemoryMeter", "resident"]

EVERY = 0.01
"""Seconds between two measurements."""


def resident() -> tuple[int, int] | None:
    """Return the resident bytes of this process as (anonymous, total with mapped files and shared memory); None if
    unknown."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        kib = [int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")]
    except (OSError, KeyError, ValueError):
        return None
    return kib[0] * 1024, sum(kib) * 1024


class MemoryMeter:
    """Context manager that measures the peaks of resident memory above `level`, an earlier result of `resident()`.

    `figures()` holds `peak_anonymous_bytes`, the memory that the work allocated, and `peak_memory_bytes`, which adds
    the resident pages of mapped files: model files and caches of activations beyond their budget, which the kernel can
    drop and read again. The first decides whether the work fits into a machine; the second is what it uses when memory
    is plentiful.
    """

    def __init__(self, level: tuple[int, int] | None) -> None:
        self.level = level
        self.peaks = (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def figures(self) -> dict[str, int]:
        """Return the peaks so far in bytes; empty where they can't be measured."""
        if self.level is None:
            return {}
        anonymous, everything = (max(0, peak - level) for peak, level in zip(self.peaks, self.level, strict=True))
        return {"peak_memory_bytes": everything, "peak_anonymous_bytes": anonymous}

    def _look(self) -> None:
        """Update the peaks with the memory in use now."""
        now = resident()
        if now is not None:
            self.peaks = max(self.peaks[0], now[0]), max(self.peaks[1], now[1])

    def _watch(self) -> None:
        while not self._stop.wait(EVERY):
            self._look()

    def __enter__(self) -> Self:
        if self.level is not None:
            self._look()
            self._thread.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self.level is not None:
            self._stop.set()
            self._thread.join()
            self._look()

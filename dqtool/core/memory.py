"""How much memory a piece of work took, as the kernel counts it (Linux; elsewhere nothing is measured)."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

__all__ = ["MemoryMeter", "resident"]

EVERY = 0.01
"""Seconds between looks."""


def resident() -> tuple[int, int] | None:
    """Bytes that this process holds in memory now: (anonymous, all: with mapped files and shared memory)."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        kib = [int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")]
    except (OSError, KeyError, ValueError):
        return None
    return kib[0] * 1024, sum(kib) * 1024


class MemoryMeter:
    """Within a `with`, the peaks of resident memory above `level`, which `resident()` gave earlier.

    `figures()` has `peak_anonymous_bytes`, what the work allocated, and `peak_memory_bytes`, with the resident pages of
    mapped files on top: caches of activations past their budget, which the kernel can drop and read again, and the
    model files themselves. What does not fit a machine is decided by the first, what it is quick with by the second.
    """

    def __init__(self, level: tuple[int, int] | None) -> None:
        self.level = level
        self.peaks = (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def figures(self) -> dict[str, int]:
        """The peaks so far, in bytes; empty where they can't be measured."""
        if self.level is None:
            return {}
        anonymous, everything = (max(0, peak - level) for peak, level in zip(self.peaks, self.level, strict=True))
        return {"peak_memory_bytes": everything, "peak_anonymous_bytes": anonymous}

    def _look(self) -> None:
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

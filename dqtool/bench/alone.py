"""Speed, memory and file size of one contender in a process of its own: no other library shares its threads or memory.

Times are those of one forward pass: seconds on the clock, and seconds of all processors together, each the median over the
calls. Peak memory is the largest resident memory above the level after imports, from loading on.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqtool.bench.contender import Loaded
    from dqtool.bench.subject import Arguments

__all__ = ["LEAST_CALLS", "Alone", "file_bytes", "time_calls"]

LEAST_CALLS = 3


@dataclass(frozen=True)
class Alone:
    """Seconds of one forward pass on the clock and of all processors, calls, peak memory and bytes on disk (None: unknown)."""

    wall: float
    processor: float
    calls: int
    peak_bytes: int | None
    file_bytes: int | None


def time_calls(loaded: Loaded, inputs: list[Arguments], seconds: float) -> dict[str, Any]:
    """Time forward passes for so many seconds, and at least `LEAST_CALLS` of them, after one that is not counted."""
    adapted = [loaded.adapt(arguments) for arguments in inputs]
    loaded.run(adapted[0])
    wall: list[float] = []
    processor: list[float] = []
    end = time.perf_counter() + seconds
    while len(wall) < LEAST_CALLS or time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        loaded.run(adapted[len(wall) % len(adapted)])
        wall.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
    return {"wall": statistics.median(wall), "processor": statistics.median(processor), "calls": len(wall)}


def file_bytes(path: Path) -> int | None:
    """Return the bytes of a file with what lies beside it under its name, or of a folder; None if there is none."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())
    found = [each.stat().st_size for each in path.parent.glob(f"{path.name}*")] if path.parent.is_dir() else []
    return sum(found) if found else None

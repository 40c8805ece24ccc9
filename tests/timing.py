"""Bounds on time that hold on busy machines."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["within"]

T = TypeVar("T")


def within(seconds: float, action: Callable[[], T], tries: int = 3) -> T:
    """Call the action and assert that its fastest call takes at most so many seconds of processor time.

    Other processes make single calls several times slower, also in processor time. Further calls are made where the
    first ones take too long.

    Args:
        seconds: Bound on the processor time of this process in seconds.
        action: Function without arguments that can be called again.
        tries: Largest number of calls.

    Returns:
        Result of the last call.

    Raises:
        AssertionError: All calls take longer.
    """
    took = []
    for _ in range(tries):
        start = time.process_time()
        result = action()
        took.append(time.process_time() - start)
        if took[-1] <= seconds:
            return result
    raise AssertionError(f"{len(took)} calls took {took} seconds of processor time, more than {seconds}")

"""Timing of several networks in one process, in turns of random order, on the same inputs."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Timing", "interleaved", "quantile"]

WARM_UP = 2
LEAST_ROUNDS = 5
CALLS_A_TURN = 2
WARM_BELOW = 0.25
"""Longest call, in seconds, whose turn starts with an untimed call. Another network's turn evicts the weights from the
caches, which steps of one network in a row do not suffer from. In longer calls the effect is negligible."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one forward pass: median, 10th and 90th percentile over `calls`."""

    median: float
    p10: float
    p90: float
    calls: int


def interleaved(
    steps: Mapping[str, Sequence[Callable[[], object]]],
    seconds: float,
    seed: int = 0,
    advance: Callable[[int], object] = lambda _n: None,
) -> dict[str, Timing]:
    """Time the functions of each entry, which are called one after another (say, one for each timestep).

    Rounds go on until `seconds` have passed after the warm-up, but at least `LEAST_ROUNDS`. In each round every entry has
    one turn, in an order that is drawn anew, so that drift of the machine affects all alike. `advance(1)` is called
    after each turn.
    """
    order = list(steps)
    shuffle = random.Random(seed)
    counters = dict.fromkeys(order, 0)
    times: dict[str, list[float]] = {name: [] for name in order}

    def call(name: str) -> float:
        functions = steps[name]
        function = functions[counters[name] % len(functions)]
        counters[name] += 1
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    pace = {name: min(call(name) for _ in range(WARM_UP)) for name in order}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        shuffle.shuffle(order)
        for name in order:
            if pace[name] < WARM_BELOW:
                call(name)
            times[name] += [call(name) for _ in range(CALLS_A_TURN if pace[name] < WARM_BELOW else 1)]
            advance(1)
        rounds += 1
    return {name: _timing(times[name]) for name in steps}


def quantile(values: Sequence[float], q: float) -> float:
    """Return the quantile `q` (0 to 1) of the values, interpolated linearly."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _timing(values: Sequence[float]) -> Timing:
    return Timing(statistics.median(values), quantile(values, 0.1), quantile(values, 0.9), len(values))

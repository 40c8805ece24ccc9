"""How a training's loss went: what manifests keep of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["POINTS", "curve", "first_and_last", "mean_curve"]

POINTS = 200
"""The most means a curve has."""


def curve(losses: Sequence[float]) -> list[float]:
    """The losses in order, thinned to means over at most `POINTS` equal stretches, to six digits."""
    count = min(POINTS, len(losses))
    edges = [len(losses) * i // count for i in range(count + 1)] if count else []
    return [float(f"{sum(losses[a:b]) / (b - a):.6g}") for a, b in pairwise(edges)]


def mean_curve(histories: Sequence[Sequence[float]]) -> list[float]:
    """The curve of the mean over several histories, iteration by iteration over those that got so far."""
    longest = max(map(len, histories), default=0)
    going = ([history[i] for history in histories if i < len(history)] for i in range(longest))
    return curve([sum(each) / len(each) for each in going])


def first_and_last(losses: Sequence[float], most: int) -> list[float]:
    """The mean of the first and of the last losses, each over up to `most` and a quarter of all; empty for none."""
    window = max(1, min(most, len(losses) // 4))
    return [sum(losses[:window]) / window, sum(losses[-window:]) / window] if losses else []

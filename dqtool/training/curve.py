"""Summaries of a training's losses for the manifest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

__all__ = ["POINTS", "curve", "first_and_last", "mean_curve"]

POINTS = 200
"""Most points of a curve."""


def curve(losses: Sequence[float]) -> list[float]:
    """Return the losses in order, averaged over at most `POINTS` equal intervals, with six significant digits."""
    count = min(POINTS, len(losses))
    edges = [len(losses) * i // count for i in range(count + 1)] if count else []
    return [float(f"{sum(losses[a:b]) / (b - a):.6g}") for a, b in pairwise(edges)]


def mean_curve(histories: Sequence[Sequence[float]]) -> list[float]:
    """Return the curve of the mean loss over several histories, at each iteration over those that reached it."""
    longest = max(map(len, histories), default=0)
    going = ([history[i] for history in histories if i < len(history)] for i in range(longest))
    return curve([sum(each) / len(each) for each in going])


def first_and_last(losses: Sequence[float], most: int) -> list[float]:
    """Return the mean of the first and of the last losses, each over at most `most` losses and a quarter of all; empty
    for none."""
    window = max(1, min(most, len(losses) // 4))
    return [sum(losses[:window]) / window, sum(losses[-window:]) / window] if losses else []

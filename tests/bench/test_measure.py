"""Interleaved timing: contenders take turns in changing order, and the figures are those of the calls."""

from __future__ import annotations

import time

import pytest

from dqtool.bench import measure
from dqtool.bench.measure import LEAST_ROUNDS, interleaved, quantile


@pytest.mark.parametrize(
    ("values", "q", "expected"), [([3.0], 0.9, 3.0), ([1.0, 2.0], 0.5, 1.5), ([4.0, 1.0, 3.0, 2.0, 5.0], 0.1, 1.4)]
)
def test_quantiles_interpolate(values: list[float], q: float, expected: float):
    assert quantile(values, q) == pytest.approx(expected)


def test_contenders_take_turns_and_go_through_their_inputs():
    calls: list[str] = []
    timings = interleaved(
        {name: [lambda n=f"{name}{i}": calls.append(n) for i in range(3)] for name in "abc"}, seconds=0
    )
    order = [call[0] for call in calls]
    assert {t.calls for t in timings.values()} == {LEAST_ROUNDS * measure.CALLS_A_TURN}
    assert order.count("a") == order.count("b") == order.count("c")
    for name in "abc":
        mine = [call for call in calls if call[0] == name]
        assert mine == [f"{name}{i % 3}" for i in range(len(mine))]
    measured = order[3 * measure.WARM_UP :]
    per_round = len(measured) // LEAST_ROUNDS
    rounds = ["".join(measured[i : i + per_round]) for i in range(0, len(measured), per_round)]
    assert all(set(each) == set("abc") for each in rounds)
    assert len(set(rounds)) > 1, "the order never changed"


def test_medians_tell_slow_from_fast_and_the_time_is_kept():
    start = time.perf_counter()
    timings = interleaved({"slow": [lambda: time.sleep(0.02)], "fast": [lambda: time.sleep(0.005)]}, seconds=0.5)
    assert 0.5 <= time.perf_counter() - start < 5
    assert timings["slow"].median > 2 * timings["fast"].median
    for timing in timings.values():
        assert timing.p10 <= timing.median <= timing.p90


def test_slow_calls_get_no_untimed_ones(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "WARM_BELOW", 0.0)
    count = []
    timings = interleaved({"a": [lambda: count.append(1)]}, seconds=0)
    assert timings["a"].calls == LEAST_ROUNDS
    assert len(count) == LEAST_ROUNDS + measure.WARM_UP

"""Plans of least cost against every plan there is."""

from __future__ import annotations

import itertools

import pytest

from dqtool.core.bits import LayerBits
from dqtool.core.quantization import QuantizationSpec
from dqtool.graph.trace import LayerInfo
from dqtool.precision.frontier import best_within, find_frontier, kept_layers, plan_cost, psnr_of, quantization_error

LAYERS = [
    LayerInfo("a", "linear", (8, 8), 6400),
    LayerInfo("b", "linear", (8, 8), 6400, shares="a"),
    LayerInfo("c.d", "conv2d", (4, 8, 3, 3), 100_000),
]
ERRORS = {
    ("a", "weights"): {4: 1e-3, 8: 1e-6},
    ("b", "weights"): {4: 1e-7, 8: 1e-10},
    ("a", "input"): {4: 4e-4, 8: 1e-6},
    ("c.d", "weights"): {4: 3e-5, 8: 1e-7},
    ("c.d", "input"): {4: 2e-2, 8: 3e-4},
}


def every_plan() -> list[dict[str, LayerBits]]:
    widths = (4, 8, 16)
    return [
        {"a": LayerBits(wa, shared), "b": LayerBits(wb, shared), "c.d": LayerBits(wc, own)}
        for wa, wb, shared, wc, own in itertools.product(widths, repeat=5)
    ]


def test_no_plan_is_cheaper_and_better() -> None:
    frontier = find_frontier(LAYERS, ERRORS, (4, 8))
    assert len(frontier) > 4
    for plan in frontier:
        for other in every_plan():
            error, (size, bops) = quantization_error(LAYERS, other, ERRORS), plan_cost(LAYERS, other)
            assert not (error < plan.error * 0.999 and size <= plan.weight_bytes and bops <= plan.bops)
    errors = [plan.error for plan in frontier]
    assert errors == sorted(errors, reverse=True)


def test_an_input_that_two_layers_read_has_one_width_and_one_error() -> None:
    for plan in find_frontier(LAYERS, ERRORS, (4, 8)):
        assert plan.bits["a"].input == plan.bits["b"].input
    coarse = dict.fromkeys(("a", "b", "c.d"), LayerBits(4, 4))
    assert quantization_error(LAYERS, coarse, ERRORS) == pytest.approx(1e-3 + 1e-7 + 4e-4 + 3e-5 + 2e-2)


def test_a_floor_is_kept() -> None:
    floor = dict.fromkeys(("a", "b", "c.d"), LayerBits(8, 8))
    for plan in find_frontier(LAYERS, ERRORS, (4, 8), floor):
        assert all(bits.weight >= 8 and bits.input >= 8 for bits in plan.bits.values())


def test_the_best_plan_within_limits() -> None:
    floor = dict.fromkeys(("a", "b", "c.d"), LayerBits(4, 4))
    size, bops = plan_cost(LAYERS, floor)
    assert best_within(LAYERS, ERRORS, (4, 8), floor, size * 0.9, bops) is None
    for extra in (0.0, 0.5, 1.0, 4.0):
        found = best_within(LAYERS, ERRORS, (4, 8), floor, size * (1 + extra), bops * (1 + extra))
        assert found is not None
        assert found.weight_bytes <= size * (1 + extra)
        assert found.bops <= bops * (1 + extra)
        for plan in find_frontier(LAYERS, ERRORS, (4, 8), floor):
            fits = plan.weight_bytes <= size * (1 + extra) and plan.bops <= bops * (1 + extra)
            assert not (fits and plan.error < found.error)


def test_keep_options_say_what_the_plan_says() -> None:
    for plan in find_frontier(LAYERS, ERRORS, (4, 8)):
        spec = QuantizationSpec(LayerBits(8, 8), kept=kept_layers(plan.bits))
        assert {info.name: spec.layer_bits(info.name, info.kind, is_end=True) for info in LAYERS} == plan.bits


def test_psnr() -> None:
    assert psnr_of(4e-3) == pytest.approx(30)
    assert psnr_of(0.0) == float("inf")

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from dqtool.page.charts import Line, Point, bands, dots, heatmap, lines, ridges, scatter
from dqtool.page.svg import Axis, compact


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123, "0.0123"), (27.09, "27.1"), (4500, "4500"), (2.14e-6, "2.1e-6"), (3e7, "3e7"), (-0.5, "-0.5")],
)
def test_compact(value: float, text: str):
    assert compact(value) == text


@pytest.mark.parametrize("values", [[1, 2, 3], [0.001, 7], [5], [0, 0], [-3, 40], [1e-9, 1e9], [99.9, 100.1], []])
def test_an_axis_holds_its_values_and_a_few_round_ticks(values: list[float]):
    axis = Axis.over("x", values)
    assert all(axis.low <= value <= axis.high for value in values)
    assert all(0 <= axis.place(value) <= 1 for value in values)
    ticks = axis.ticks(6)
    assert len(ticks) <= 7
    assert ticks == sorted(ticks)
    assert all(axis.low - 1e-9 <= tick <= axis.high * (1 + 1e-9) + 1e-9 for tick in ticks)


@pytest.mark.parametrize(
    "values", [[25.6, 25.8], [0, 0.0147], [4, 999], [-3, 40], [1e-7, 3e-7], [1e6, 3e6], [99.98, 100.01]]
)
def test_ticks_are_told_apart(values: list[float]):
    axis = Axis("x", min(values), max(values))
    texts = [axis.text(tick) for tick in axis.ticks()]
    assert len(set(texts)) == len(texts) >= 2


def test_wide_spans_of_positive_values_are_logarithmic():
    assert Axis.over("x", [0.01, 5]).log
    assert not Axis.over("x", [1, 5]).log
    assert not Axis.over("x", [0, 5000]).log


CHARTS = {
    "scatter": scatter(
        "t<&>", "MB", "fd", [Point(1, 'a"b', 1.0, 2.0, 0), Point(2, "c", 1.0, 2.0, 9)], ("fp", 1.5, None)
    ),
    "one point": scatter("t", "MB", "fd", [Point(1, "a", 0.0, 0.0, 0)], None),
    "lines": lines("t", "t", "e", [Line("a", [999, 499, 0], [1, 0.1, 0.001], 0), Line("b", [999], [3], 1, 1)], True),
    "dots": dots("t", "e", ["x" * 80, "y"], [("a", 0, [0.1, None]), ("b", 3, [None, None])]),
    "heatmap": heatmap("t", "t", [("a.b.c", [0.0, 1.0]), ("d", [0.1, 0.2])], ("999", "0"), "e"),
    "ridges": ridges("t", "v", (-1, 1), [("0", [0.0, 1.0], [0.5, 0.5]), ("1", [0, 0], [0, 0])], ("a", "b")),
    "bands": bands("t", "t", "v", [5.0], ("a", [(-1, 1)]), ("b", [(0, 0)])),
}


@pytest.mark.parametrize("chart", CHARTS)
def test_every_chart_is_well_formed_named_and_within_its_box(chart: str):
    root = ElementTree.fromstring(CHARTS[chart])
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img"
    assert [child.tag for child in root[:2]] == [f"{space}title", f"{space}desc"]
    assert all(child.text for child in root[:2])
    _, _, width, height = map(float, root.get("viewBox", "").split())
    for element in root.iter():
        for key, value in element.attrib.items():
            assert "nan" not in value
            assert "inf" not in value
            if key in ("x", "cx"):
                assert -0.5 <= float(value) <= width + 0.5
            if key in ("y", "cy"):
                assert -0.5 <= float(value) <= height + 0.5

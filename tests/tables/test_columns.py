"""Columns whose value combines figures of two cells or two stages."""

from __future__ import annotations

import pytest

from dqtool.tables.columns import COLUMNS


@pytest.mark.parametrize(
    ("distance", "baseline", "left"),
    [(2.0, 6.0, 0.0), (3.0, 6.0, 25.0), (1.0, 6.0, -25.0), (6.0, 6.0, 100.0), (1.0, 2.0, None), (3.0, 1.5, None)],
)
def test_excess_is_a_share_of_what_the_baseline_adds(distance: float, baseline: float, left: float | None) -> None:
    """The excess is None if the baseline's images are as close to real ones as full precision's."""

    def metrics(value: float) -> dict:
        return {"eval": {"fd.digits": value, "reference": {"fd.digits": 2.0}}}

    relative = COLUMNS["excess"].relative
    assert relative is not None
    assert relative(metrics(distance), metrics(baseline)) == left


def test_factors_are_those_of_the_stage_that_chose_them() -> None:
    """Factors of `calibrate`, which replaces those of `dilate`, are the ones that are shown."""
    first = {"dilate": {"unsaturated_share": 0.0, "mean_dilation": 1.0}}
    chosen = {"calibrate": {"unsaturated_share": 0.875, "mean_dilation": 4.0}}
    for name, before, after in (("unsaturated", 0.0, 87.5), ("mean_dilation", 1.0, 4.0)):
        assert COLUMNS[name].value(first) == before
        assert COLUMNS[name].value(first | chosen) == after

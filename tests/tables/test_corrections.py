"""`corrections: true`: all rows without the correction of predictions, then all rows with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqtool.stages.options.distill import corrects_predictions
from dqtool.stages.registry import make_options
from dqtool.tables.planning import Target, plan_table
from dqtool.tables.provenance import provenance
from dqtool.tables.spec import load_table

TABLES = Path(__file__).parents[2] / "recipes" / "tables"
COMPARISONS = ("cifar10", "bedroom", "church", "imagenet", "coco", "dit", "samplers", "scaling")
TRAINING = ("dilate", "calibrate", "distill")


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_row_of_a_comparison_stands_without_and_with_the_correction(name: str) -> None:
    table = load_table(TABLES / f"table-{name}.yaml")
    rows = {row.name: row for row in table.rows if not row.paper_only}
    plain = [each for each in rows if not each.endswith(", corrected")]
    assert sorted(rows) == sorted([*plain, *(f"{each}, corrected" for each in plain)])
    group = table.groups[0].name
    cells = {cell.row: cell for cell in plan_table(table, Target()) if cell.group == group}
    for each in plain:
        for row, expected in ((rows[each], False), (rows[f"{each}, corrected"], True)):
            options = make_options("distill", row.options.get("distill", {}))
            shown = row.options.get("eval", {}).get("correction", "auto") != "off"
            assert (corrects_predictions(options) and shown) is expected, row.name
            assert provenance(cells[row.name])["correction"] is expected, row.name


def test_a_pair_of_rows_has_one_training() -> None:
    """The first row of a pair is the second's network with its tables switched off; the preset `paper` has its own."""
    cells = {cell.row: cell for cell in plan_table(load_table(TABLES / "table-cifar10.yaml"), Target())}
    for name, together in (("EDA-DM", True), ("DilateQuant, scaling auto", True), ("DilateQuant", False)):
        keys = [
            {step.stage: step.key for step in cells[row].steps if step.stage in TRAINING}
            for row in (name, f"{name}, corrected")
        ]
        assert (keys[0] == keys[1]) is together, name


def test_the_rows_of_the_ablation_add_one_part_each() -> None:
    table = load_table(TABLES / "ablation.yaml")
    names = ["PTQ", "+ TPQ", "+ WD", "+ BKD (the paper)", "+ own trajectory", "+ auto scaling"]
    assert [row.name for row in table.rows] == [*names, *(f"{name}, corrected" for name in names[1:])]
    cells = {cell.row: {step.stage: step.parameters for step in cell.steps} for cell in plan_table(table, Target())}
    distill = {name: cells[name]["distill"] for name in names}
    paper, own = distill["+ BKD (the paper)"]["recipe"], distill["+ own trajectory"]["recipe"]
    assert paper["refine_iters"] == 0
    assert paper["iters"] == own["iters"] + own["refine_iters"] == 120  # these take equal time
    assert "correct_images" not in distill["+ BKD (the paper)"]
    assert [cells[name]["calibrate"].get("scaling", "keep") for name in names] == ["keep"] * 5 + ["auto"]
    assert {cell.seed for cell in plan_table(table, Target())} == {0, 1, 2}

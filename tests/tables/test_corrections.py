"""`corrections: true`: all rows without the correction of predictions, then all rows with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqtool.stages.options.distill import corrects_predictions
from dqtool.stages.registry import make_options
from dqtool.tables.planning import Target, plan_table
from dqtool.tables.spec import load_table

TABLES = Path(__file__).parents[2] / "recipes" / "tables"
COMPARISONS = ("cifar10", "bedroom", "church", "imagenet", "coco", "dit", "samplers", "scaling")


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_row_of_a_comparison_stands_without_and_with_the_correction(name: str) -> None:
    rows = {row.name: row for row in load_table(TABLES / f"table-{name}.yaml").rows if not row.paper_only}
    plain = [each for each in rows if not each.endswith(", corrected")]
    assert sorted(rows) == sorted([*plain, *(f"{each}, corrected" for each in plain)])
    for each in plain:
        for row, expected in ((rows[each], False), (rows[f"{each}, corrected"], True)):
            assert corrects_predictions(make_options("distill", row.options.get("distill", {}))) is expected, row.name


def test_the_rows_of_the_ablation_add_one_part_each() -> None:
    table = load_table(TABLES / "ablation.yaml")
    names = [
        "PTQ",
        "+ TPQ",
        "+ WD",
        "+ BKD (the paper)",
        "+ own trajectory",
        "+ auto scaling",
        "+ correction (the default)",
    ]
    assert [row.name for row in table.rows] == names
    cells = {cell.row: {step.stage: step.parameters for step in cell.steps} for cell in plan_table(table, Target())}
    distill = {name: cells[name]["distill"] for name in names}
    assert distill["+ BKD (the paper)"]["recipe"]["refine_iters"] == 0
    assert distill["+ BKD (the paper)"]["recipe"]["iters"] == distill["+ own trajectory"]["recipe"]["iters"] == 300
    assert distill["+ own trajectory"]["recipe"]["refine_iters"] == 300
    assert ["correct_images" in distill[name] for name in names] == [False] * 6 + [True]
    assert [cells[name]["calibrate"].get("scaling", "keep") for name in names] == ["keep"] * 5 + ["auto"] * 2

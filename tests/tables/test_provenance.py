"""Results say how they were made, and all of them can be made in the time that the Makefile promises."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dqtool.errors import UsageError
from dqtool.stages.options.distill import DistillOptions, method_and_options
from dqtool.tables.__main__ import WORKERS, main
from dqtool.tables.cells import CellStore
from dqtool.tables.planning import Target, plan_table
from dqtool.tables.provenance import iterations, provenance
from dqtool.tables.rendering import render_markdown, summarise
from dqtool.tables.spec import load_table

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "recipes" / "tables").glob("*.yaml"))
HOURS = 12


def cells_of(name: str) -> dict:
    return {
        (cell.row, cell.seed): cell for cell in plan_table(load_table(ROOT / f"recipes/tables/{name}.yaml"), Target())
    }


def test_a_cell_names_its_commands_seeds_method_passes_and_correction() -> None:
    found = provenance(cells_of("table-cifar10")["DilateQuant, scaling auto, corrected", 2])
    assert found["seeds"] == {"calibrate": 2, "distill": 2, "eval": 2}
    assert found["method"] == "bkd" and found["passes"] == {"blocks": 60, "all blocks": 60}
    assert found["correction"] is True
    assert [command.split()[:2] for command in found["commands"]] == [
        ["dqtool", stage] for stage in ("dilate", "calibrate", "distill", "export", "eval")
    ]
    assert "--correct-noise" in found["commands"][2] and "--floor" in found["commands"][4]
    plain = provenance(cells_of("table-cifar10")["DilateQuant, scaling auto", 2])
    assert plain["correction"] is False
    assert "--correction off" in plain["commands"][4]
    assert plain["commands"][:4] == found["commands"][:4]


def test_every_command_of_a_cell_is_one_that_the_command_line_takes() -> None:
    import typer

    from dqtool.cli import app

    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    cells = cells_of("ablation") | cells_of("table-cost") | cells_of("table-bedroom")
    commands = {command for cell in cells.values() for command in provenance(cell)["commands"]}
    assert len(commands) > 20
    for command in commands:
        _, stage, *arguments = shlex.split(command)
        known[stage].make_context(stage, arguments)  # raises for what it does not take


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("PTQ", ""),
        ("EDA-DM", "60 a block (20,000 a block)"),
        ("EfficientDM", "600 (16,000)"),
        ("DilateQuant, scaling auto", "60 a block and 60 of all blocks"),
    ],
)
def test_iterations_stand_beside_those_of_the_methods_own_paper(row: str, expected: str) -> None:
    assert iterations(cells_of("table-cifar10")[row, 0]) == expected


def test_a_table_shows_iterations_and_explains_the_floor(tmp_path: Path) -> None:
    table = load_table(ROOT / "recipes/tables/table-cifar10.yaml")
    summary = summarise(table, Target(), plan_table(table, Target()), CellStore(tmp_path), "command")
    text = render_markdown(summary)
    assert "iterations (of its paper)" in text and "600 (16,000)" in text
    assert "is the floor" in text


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_with_a_distance_have_its_floor_and_a_paired_measure(path: Path) -> None:
    columns = load_table(path).columns
    if "fd.digits" in columns:
        assert "fd.digits_from_reference" in columns and "psnr" in columns


def test_all_tables_fit_twelve_hours_of_two_cores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", *map(str, TABLES), "--results", str(ROOT / "recipes" / "results")]) == 0
    found = re.search(rf"on {WORKERS} cores: [\d.]+ hours left, ([\d.]+) in all", capsys.readouterr().out)
    assert found and float(found[1]) <= HOURS


def test_the_rate_multiplies_every_rate_of_a_method() -> None:
    plain = method_and_options(DistillOptions(method="lsq"))[1]
    third = method_and_options(DistillOptions(method="lsq", rate=0.3))[1]
    assert third.rates.weight == pytest.approx(0.3 * plain.rates.weight)
    assert third.rates.zero_point == pytest.approx(0.3 * plain.rates.zero_point)
    assert third.iters == plain.iters
    both = method_and_options(DistillOptions(rate=2.0))[1]
    assert both.refine_rates.weight == pytest.approx(2 * method_and_options(DistillOptions())[1].refine_rates.weight)
    with pytest.raises(UsageError, match="--rate"):
        DistillOptions(method="ptq", rate=2.0)

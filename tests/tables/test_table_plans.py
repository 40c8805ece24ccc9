"""Plans of tables: keys, forecasts, groups and seeds, and tables on published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_pipeline

from dqtool.artifacts.records import EnvironmentRecord
from dqtool.page.results import find_tables
from dqtool.tables.__main__ import main
from dqtool.tables.cells import CellRecord, CellStore, StageRun
from dqtool.tables.forecast import _rates, forecast
from dqtool.tables.naming import variant_of
from dqtool.tables.planning import Target, plan_table
from dqtool.tables.rendering import summarise
from dqtool.tables.spec import load_table

TABLES = sorted((Path(__file__).parents[2] / "recipes" / "tables").glob("*.yaml"))


def test_a_row_that_the_version_can_not_run_is_said(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "later.yaml"
    path.write_text(tiny.read_text().replace("{scaling: smoothquant}", "{scaling: of tomorrow}"))
    cells = plan_table(load_table(path), Target())
    problems = [cell for cell in cells if cell.problem]
    assert {cell.row for cell in problems} == {"SmoothQuant"}
    assert forecast(cells, CellStore(tmp_path / "none")).problems == len(problems) == 1


def test_keys_tell_the_components_of_a_model_apart() -> None:
    table = load_table(next(path for path in TABLES if path.stem == "table-wd"))
    keys = [
        plan_table(table, Target("zoo:digits-dit", overrides={"dilate": given}))[0].key
        for given in ({}, {"components": "vae"})
    ]
    assert all(keys)
    assert keys[0] != keys[1]


def test_a_short_schedule_shortens_all_that_quest_trains() -> None:
    table = load_table(next(path for path in TABLES if path.stem == "table-bedroom"))
    cell = next(cell for cell in plan_table(table, Target()) if cell.row == "QuEST")
    recipe = next(step.parameters["recipe"] for step in cell.steps if step.stage == "distill")
    assert (recipe["iters"], recipe["temporal_iters"]) == (600, 100)


def test_what_is_left_and_all_of_it_are_the_same_until_a_cell_is_finished(tiny: Path, tmp_path: Path) -> None:
    cells = plan_table(load_table(tiny), Target(seeds=(0,)))
    store = CellStore(tmp_path / "cells")
    before = forecast(cells, store)
    assert before.seconds == before.whole_seconds > 0
    runs = [StageRun(s.stage, dict(s.parameters), cpu_seconds=1000.0) for s in cells[0].steps]
    store.save(cells[0].key, CellRecord(runs, "another", EnvironmentRecord(device="cuda:0")))
    after = forecast(cells, store)
    assert after.finished == 1
    assert 0 < after.seconds < after.whole_seconds == before.whole_seconds


def test_hours_come_from_the_same_model_and_from_the_cpu() -> None:
    def record(model: str, seconds: float, device: str = "cpu") -> CellRecord:
        run = StageRun("eval", {"samples": 10, "runtime": "cpu"}, cpu_seconds=seconds)
        return CellRecord([run], model, EnvironmentRecord(device=device))

    rates = _rates([record("a", 200.0), record("b", 600.0), record("b", 1e6, "cuda:0")])
    assert rates["eval by cpu", "a"] == rates["eval by cpu", "a", ""] == 1.0
    assert rates["eval by cpu", "b"] == 3.0
    assert rates["eval by cpu",] == 2.0


def test_groups_and_seeds_that_are_asked_for(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tiny), "--dry-run", "--groups", "4/5", "--results", str(tmp_path)]) == 2
    assert "Did you mean 4/4?" in capsys.readouterr().err
    command = [
        str(tiny),
        "--results",
        str(tmp_path),
        "--work",
        str(tmp_path / "work"),
        "--groups",
        "8/8",
        "--seeds",
        "7",
    ]
    assert main(command) == 0
    summary = json.loads((tmp_path / "tiny.json").read_text())
    assert summary["cells"]["finished"] == 1
    assert summary["seeds"] == [0, 1, 7]
    assert [row["seeds"] for row in summary["rows"] if row["group"] == "8/8" and row.get("seeds")] == [[7]]


def test_a_published_table_says_which_files_it_needs_before_anything_runs(tmp_path: Path) -> None:
    table = load_table(next(path for path in TABLES if path.stem == "table-coco"))
    cells = plan_table(table, Target("zoo:digits-sd"))
    expected = "table-coco needs --set calibrate.prompts=FILE --set eval.prompts=FILE"
    assert {cell.problem for cell in cells} == {expected}
    prompts = tmp_path / "captions.txt"
    prompts.write_text("a cat\na dog\n")
    given = {"calibrate": {"prompts": str(prompts)}, "eval": {"prompts": str(prompts)}}
    assert not any(cell.problem for cell in plan_table(table, Target("zoo:digits-sd", overrides=given)))


def test_metrics_of_a_published_model_are_those_that_its_statistics_hold(tmp_path: Path) -> None:
    table = load_table(next(path for path in TABLES if path.stem == "table-cifar10"))
    statistics = tmp_path / "fid-only.npz"
    np.savez(statistics, mu=np.zeros(2048), sigma=np.eye(2048))
    given = {"inception_weights": str(Path(__file__)), "ref_stats": str(statistics)}
    cell = plan_table(table, Target("zoo:digits-ddpm", overrides={"eval": given}))[0]
    assert cell.steps[-1].parameters["metrics"] == ["similarity", "cost", "fid", "fid-reference", "is"]


def test_results_of_another_model_schedule_or_option_have_names_of_their_own(
    tiny: Path, made: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short.yaml"  # without training and images, for speed
    short.write_text(tiny.read_text().replace("schedule: full", "schedule: full\nstages: [dilate, calibrate]", 1))
    other = tiny_pipeline(tmp_path / "other" / "tiny", seed=1)
    results = tmp_path / "results"
    command = [str(short), "--seeds", "0", "--groups", "8/8"]
    command += ["--results", str(results), "--work", str(tmp_path / "work")]

    def written(*more: str) -> set[str]:
        before = {path: path.read_bytes() for path in results.glob("*.json")}
        assert main([*command, *more]) == 0
        assert all(path.read_bytes() == content for path, content in before.items())
        return {path.stem for path in set(results.glob("*.json")) - set(before)}

    assert written() == {"short"}
    (first,), (second,) = written("--model", str(made / "tiny")), written("--model", str(other))
    assert first[:-8] == second[:-8] == "short-published-tiny-"
    assert written("--schedule", "smoke") == {"short-smoke"}
    (changed,) = written("--set", "calibrate.samples=8")
    assert changed.startswith("short-set-")
    assert written("--model", str(other), "--set", "calibrate.samples=8") == {second + changed.removeprefix("short")}
    stems = sorted(path.stem for path in results.glob("*.json"))
    assert [table["name"] for table in find_tables([str(results)])] == stems


def test_what_a_table_says_itself_is_no_variant(tiny: Path) -> None:
    table = load_table(tiny)
    for target in (Target(), Target(schedule="full"), Target(overrides={"calibrate": {"samples": 4}})):
        assert variant_of(table, target, plan_table(table, target)) == ""


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("there/model-790000.ckpt", "model-790000"),
        ("stable-diffusion-v1.4/", "stable-diffusion-v1.4"),
        ("org/model@main", "model-main"),
        ("zoo:digits-ddpm", "digits-ddpm"),
    ],
)
def test_a_published_model_is_named_by_its_last_part(tiny: Path, model: str, name: str) -> None:
    assert variant_of(load_table(tiny), Target(model), []) == f"published-{name}"


def test_a_published_model_takes_the_place_of_the_embedded_one(tiny: Path, tmp_path: Path, made: Path) -> None:
    path = tmp_path / "published.yaml"
    published = "published:\n  columns: [psnr]\n  options: {calibrate: {samples: 12}}\ngroups:"
    path.write_text(tiny.read_text().replace("groups:", published, 1).replace(str(made / "tiny"), "zoo:digits-ddpm"))
    table = load_table(path)
    cells = plan_table(table, Target(model=str(made / "tiny")))
    assert {step.parameters["samples"] for cell in cells for step in cell.steps if step.stage == "calibrate"} == {12}
    assert {step.model for cell in cells for step in cell.steps} == {str(made / "tiny")}
    summary = summarise(table, Target(model=str(made / "tiny")), cells, CellStore(tmp_path / "none"), "x")
    assert [column["key"] for column in summary["columns"]] == ["psnr"]
    assert summary["runs_on"] == f"on {made / 'tiny'}"


def test_iterations_of_a_published_table_are_those_of_a_block(made: Path) -> None:
    """A method that trains the whole network gets ten times the iterations, and one that trains nothing gets none."""
    table = load_table(next(path for path in TABLES if path.stem == "table-cifar10"))

    def iterations(**options: Any) -> dict[str, int]:
        cells = plan_table(table, Target(str(made / "tiny"), **options))
        recipes = {cell.row: cell.steps[-2].parameters["recipe"] for cell in cells if cell.group == "4/4"}
        return {row: recipe["iters"] for row, recipe in recipes.items() if "iters" in recipe}

    found = iterations()
    assert {found[row] for row in ("EDA-DM", "TFMQ-DM", "DilateQuant")} == {5000}
    assert {found[row] for row in ("LSQ", "EfficientDM")} == {50000}
    assert not found.get("PTQ")
    asked = iterations(overrides={"distill": {"iters": 7}})
    assert {asked[row] for row in ("EDA-DM", "LSQ", "EfficientDM", "DilateQuant")} == {7}


def test_guidance_of_the_published_samplers_is_that_of_their_recipe() -> None:
    table = load_table(next(path for path in TABLES if path.stem == "table-samplers"))
    cells = plan_table(table, Target("zoo:digits-ldm"))
    found = {c.group: s.parameters["guidance"] for c in cells for s in c.steps if s.stage == "calibrate"}
    assert {found[group] for group in found if "100" in group} == {1.5}
    assert {found[group] for group in found if "20" in group} == {3}


@pytest.mark.parametrize("schedule", ["full", "short", "smoke"])
def test_cells_train_as_distill_does_for_their_sampler(schedule: str) -> None:
    path = next(path for path in TABLES if path.stem == "table-samplers")
    cells = plan_table(load_table(path), Target(schedule=schedule))
    distills = {(c.group, c.row): next(s for s in c.steps if s.stage == "distill") for c in cells}
    for (group, row), step in distills.items():
        plms = group.startswith("PLMS")
        own = row == "DilateQuant"  # `--preset paper` fits no correction; other pairs of rows share their training
        assert ("correct_images" in step.parameters) != own, (group, row)
        if row.startswith("DilateQuant, scaling auto"):  # the paper's form has one pass
            assert (step.parameters["recipe"]["refine_iters"] == 0) == plms, (group, row)
        else:
            assert not step.parameters["recipe"].get("refine_iters"), (group, row)

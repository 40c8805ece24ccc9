"""Tables: checks of their files, the cells they are planned to, and finished cells, which never run again."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import tiny_pipeline

from dqtool.errors import NumericError, UsageError
from dqtool.metrics import METRICS
from dqtool.page.results import find_tables
from dqtool.stages.registry import option_types
from dqtool.stages.shared.settings import RunSettings
from dqtool.tables.__main__ import main
from dqtool.tables.cells import CellStore, claim
from dqtool.tables.forecast import _rates, forecast
from dqtool.tables.naming import variant_of
from dqtool.tables.planning import Target, plan_table
from dqtool.tables.rendering import render_markdown, summarise
from dqtool.tables.running import Runner
from dqtool.tables.spec import load_table

TABLES = sorted((Path(__file__).parents[2] / "recipes" / "tables").glob("*.yaml"))
TINY = """
title: A tiny table
source: Table 0
model: {model}
schedule: full
seeds: [0, 1]
baseline: none
columns: [psnr, unsaturated, size_ratio]
paper-columns: FID
options:
  calibrate: {{steps: 2, samples: 4}}
  distill: {{iters: 0}}
  eval: {{samples: 2, metrics: [similarity, cost]}}
groups:
  - name: 4/4
    seeds: [0]
    options: {{distill: {{bits: 4/4}}}}
    paper-reference: 4.26
  - name: 8/8
    options: {{distill: {{bits: 8/8}}}}
rows:
  - name: none
    options: {{dilate: {{scaling: none}}, calibrate: {{scaling: keep}}}}
    paper: {{4/4: 9.63}}
  - name: SmoothQuant
    groups: [4/4]
    options: {{dilate: {{scaling: none}}, calibrate: {{scaling: smoothquant}}}}
  - name: theirs
    paper-only: true
    paper: {{4/4: 30.69}}
"""


@pytest.fixture(scope="module")
def tiny(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "tiny.yaml"
    path.write_text(TINY.format(model=made / "tiny"))
    return path


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the tiny table by its command line; return the folder with its results and artifacts."""
    place = tmp_path_factory.mktemp("finished")
    assert main([str(tiny), "--results", str(place / "results"), "--work", str(place / "work")]) == 0
    return place


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_is_valid_and_plans_cells(path: Path, tmp_path: Path) -> None:
    later = {"preset", "train-samples"} - set(option_types("distill"))
    if any(f"{option}:" in path.read_text() for option in later):
        pytest.skip(f"needs distill --{next(iter(later))}")
    table = load_table(path)
    cells = plan_table(table, Target())
    rows = {row.name for row in table.rows if not row.paper_only}
    assert {cell.row for cell in cells} == rows
    given: dict[str, dict[str, Any]] = {}
    for name in table.published.needs:
        stage, _, option = name.partition(".")
        prompts = tmp_path / "captions.txt"
        prompts.write_text("one")
        given.setdefault(stage, {})[option] = str(prompts)
    published = plan_table(table, Target(model="zoo:digits-ddpm", overrides=given))
    assert {cell.row for cell in published} == rows
    assert [cell.problem for cell in (*cells, *published) if cell.problem] == []
    assert all(cell.steps for cell in (*cells, *published))
    labels = [(cell.group, cell.row, cell.seed) for cell in cells]
    assert len(set(labels)) == len(labels)
    assert {cell.seed for cell in cells if cell.steps} <= {0, 1, 2}


def test_every_table_of_the_paper_has_its_target() -> None:
    targets = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "bench-all" in targets
    assert "recipes/tables/" in targets


@pytest.mark.parametrize(
    ("change", "line", "says"),
    [
        (("seeds:", "sedes:"), 6, "Did you mean seeds"),
        (("scaling: smoothquant", "scalling: smoothquant"), 27, "Did you mean scaling"),
        (("unsaturated,", "unsaturatd,"), 8, "Did you mean unsaturated"),
        (("samples: 4}", "samples: many}"), 11, "a whole number"),
        (("paper: {4/4: 30.69}", "paper: {3/3: 30.69}"), 30, "Unknown group"),
        (("schedule: full", "schedule: fast"), 5, "Unknown schedule"),
        (("baseline: none", "baseline: nothing"), 7, "No row is called"),
        (("steps: 2,", "steps: 2, seed: 3,"), 11, "set by the runner"),
    ],
)
def test_what_a_table_does_not_know_is_refused_with_its_line(
    tiny: Path, tmp_path: Path, change: tuple[str, str], line: int, says: str
) -> None:
    text = tiny.read_text()
    assert change[0] in text
    bad = tmp_path / "bad.yaml"
    bad.write_text(text.replace(change[0], change[1], 1))
    with pytest.raises(UsageError) as caught:
        load_table(bad)
    assert f"bad.yaml:{line}" in str(caught.value)
    assert says in str(caught.value)


def test_cells_come_seed_by_seed_and_share_their_first_stages(tiny: Path) -> None:
    cells = plan_table(load_table(tiny), Target())
    assert [cell.seed for cell in cells] == [0, 0, 0, 1]
    smooth = next(cell for cell in cells if cell.row == "SmoothQuant")
    assert [step.stage for step in smooth.steps] == ["dilate", "calibrate", "distill", "export", "eval"]
    plain = next(cell for cell in cells if cell.row == "none")
    assert plain.steps[0].key == smooth.steps[0].key  # both rows share this step
    assert plain.steps[1].key != smooth.steps[1].key


def test_a_scaling_that_compares_outputs_does_so_at_the_bits_of_its_cell(tiny: Path) -> None:
    given = {"calibrate": {"scaling": "auto"}}
    for cell in plan_table(load_table(tiny), Target(overrides=given)):
        assert cell.steps[1].parameters["bits"] == cell.group
    fixed = {"calibrate": {"scaling": "auto", "bits": "3/3"}}
    for cell in plan_table(load_table(tiny), Target(overrides=fixed)):
        assert cell.steps[1].parameters["bits"] == "3/3"


def test_keys_follow_what_decides_the_result_and_nothing_else(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = load_table(tiny)

    def keys(target: Target) -> list[str]:
        return [cell.key for cell in plan_table(table, target)]

    first = keys(Target())
    assert first == keys(Target())
    assert len(set(first)) == len(first)
    assert first == keys(Target(overrides={"distill": {"method": "bkd"}}))  # the default, given explicitly
    assert not set(first) & set(keys(Target(overrides={"eval": {"samples": 3}})))
    earlier = plan_table(table, Target())[0].steps[1].key
    monkeypatch.setattr("dqtool.stages.distill.CODE_VERSION", 10**6)
    changed = plan_table(table, Target())[0]
    assert changed.key != first[0]
    assert changed.steps[1].key == earlier


def test_a_finished_table_is_never_run_again_even_without_its_artifacts(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_name: str) -> Any:
        raise AssertionError("a stage was asked for")

    monkeypatch.setattr("dqtool.tables.running.stage_function", refuse)
    before = (finished / "results" / "tiny.md").read_text()
    assert main([str(tiny), "--results", str(finished / "results"), "--work", str(tmp_path / "empty")]) == 0
    assert (finished / "results" / "tiny.md").read_text() == before
    capsys.readouterr()
    assert main([str(tiny), "--dry-run", "--results", str(finished / "results")]) == 0
    row = capsys.readouterr().out.splitlines()[2].split()
    assert row[:5] == ["tiny", "4", "4", "0", "0.00"]


def test_a_figure_that_reports_have_got_since_leaves_cells_finished_until_they_are_refreshed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = load_table(tiny)
    keys = [cell.key for cell in plan_table(table, Target())]
    for name in ("similarity", "digits"):
        monkeypatch.setitem(METRICS, name, replace(METRICS[name], added=7))
    assert keys == [cell.key for cell in plan_table(table, Target())]

    short = tmp_path / "short.yaml"  # without training and images, for speed
    short.write_text(tiny.read_text().replace("schedule: full", "stages: [dilate, calibrate]", 1))
    command = [str(short), "--seeds", "0", "--groups", "8/8", "--results", str(tmp_path / "results")]
    work = ["--work", str(tmp_path / "work")]
    assert main([*command, *work]) == 0
    (path,) = (tmp_path / "results" / "cells").glob("*.json")
    cell = json.loads(path.read_text())
    spent = [stage["cpu_seconds"] for stage in cell["stages"]]
    current = cell["measures"]
    path.write_text(json.dumps(cell | {"measures": current - 1}))
    assert main([*command, *work]) == 0
    assert json.loads(path.read_text())["measures"] == current - 1
    capsys.readouterr()
    assert main([*command, "--refresh", "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:3] == ["short", "1", "0"]
    assert main([*command, *work, "--refresh"]) == 0
    again = json.loads(path.read_text())
    assert again["measures"] == current
    assert [stage["cpu_seconds"] for stage in again["stages"]] == spent, "artifacts that were there took what they took"
    monkeypatch.setattr("dqtool.tables.running.stage_function", lambda _name: pytest.fail("a stage was asked for"))
    assert main([*command, "--refresh", "--work", str(tmp_path / "empty")]) == 0


def test_a_killed_run_goes_on_where_it_was(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dqtool.stages import registry

    short = tmp_path / "short.yaml"  # without training and images, for speed
    short.write_text(tiny.read_text().replace("schedule: full", "stages: [dilate, calibrate]", 1))
    done: list[str] = []
    deadly = 2

    def counted(name: str) -> Any:
        def call(options: Any, settings: Any) -> str:
            if len(done) == deadly:
                raise KeyboardInterrupt
            path = registry.stage_function(name)(options, settings)
            if not settings.log[-1].cached:
                done.append(path)
            return path

        return call

    monkeypatch.setattr("dqtool.tables.running.stage_function", counted)
    command = [str(short), "--seeds", "0", "--groups", "4/4"]
    command += ["--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    assert main(command) == 130
    assert len(list((tmp_path / "results" / "cells").glob("*.json"))) == 1
    deadly = 10**6
    assert main(command) == 0
    assert (
        len(done) == len(set(done)) == 3
    )  # two steps of the first cell, and the calibration of the second, which shares its dilation
    summary = json.loads((tmp_path / "results" / "short.json").read_text())
    assert summary["cells"] == {
        "finished": 2,
        "all": 3,
        "problems": [],
    }  # without distill, both bit widths have the same cells
    assert "Incomplete: 2 of 3" in (tmp_path / "results" / "short.md").read_text()


def test_what_is_rendered(finished: Path) -> None:
    text = (finished / "results" / "tiny.md").read_text()
    assert text.startswith("# A tiny table (Table 0 of arXiv 2409.14307), on the embedded ")
    assert "2 sampling steps; 4 calibration points; 2 images; seeds 0, 1." in text
    assert "| 4/4 | full precision | – | – | – | 4.26 |" in text
    assert "|  | theirs |  |  |  | 30.69 |" in text
    assert " ± " in text
    assert "Made by `python -m dqtool.tables " in text
    summary = json.loads((finished / "results" / "tiny.json").read_text())
    psnr = next(row for row in summary["rows"] if (row["name"], row["group"]) == ("none", "8/8"))["values"]["psnr"]
    assert len(psnr["values"]) == 2
    assert psnr["mean"] == pytest.approx(sum(psnr["values"]) / 2)
    record = json.loads(next((finished / "results" / "cells").glob("*.json")).read_text())
    assert {"dilate", "calibrate", "distill", "eval", "errors"} <= set(record["metrics"])
    errors = record["metrics"]["errors"]
    assert errors["weight_clipping"] + errors["weight_rounding"] == pytest.approx(1)
    assert errors["bound"] > 0


def test_two_workers_share_cells_and_a_claimed_cell_is_waited_for(
    tiny: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = plan_table(load_table(tiny), Target())[:2]
    store, theirs = CellStore(tmp_path / "cells"), CellStore(finished / "results" / "cells")
    runner = Runner(tmp_path / "work", store, RunSettings(quiet=True))
    ran: list[str] = []
    monkeypatch.setattr(
        Runner, "_finish", lambda _self, cell: (ran.append(cell.key), store.save(cell.key, {"stages": []}))
    )

    def other_worker_finishes(_seconds: float) -> None:
        record = theirs.load(cells[0].key)
        assert record is not None
        store.save(cells[0].key, record)

    monkeypatch.setattr("dqtool.tables.running.time.sleep", other_worker_finishes)
    with claim(tmp_path / "work" / f".{cells[0].key[:32]}.cell", wait=False) as mine:
        assert mine
        assert runner.run(cells, lambda: None) == 1
    assert ran == [cells[1].key]


def test_an_interrupt_reaches_a_worker_in_the_background(tiny: Path, tmp_path: Path) -> None:
    """An interrupt stops a worker even if a shell started it with interrupts ignored, as `make bench-all` does."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main([str(tiny), "--dry-run", "--results", str(tmp_path)]) == 0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_numbers_that_fail_are_a_result(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(_self: Runner, _step: Any) -> Any:
        raise NumericError("The distillation loss is no longer finite.")

    monkeypatch.setattr(Runner, "_make", diverge)
    table = load_table(tiny)
    cells = plan_table(table, Target(seeds=(0,)))
    store = CellStore(tmp_path / "cells")
    Runner(tmp_path / "work", store, RunSettings(quiet=True)).run(cells, lambda: None)
    text = render_markdown(summarise(table, Target(), cells, store, "make tiny"))
    assert "failed" in text
    assert "no longer finite" in text


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
    entries = [{"stage": s.stage, "parameters": dict(s.parameters), "cpu_seconds": 1000.0} for s in cells[0].steps]
    store.save(cells[0].key, {"model": "another", "environment": {"device": "cuda:0"}, "stages": entries})
    after = forecast(cells, store)
    assert after.finished == 1
    assert 0 < after.seconds < after.whole_seconds == before.whole_seconds


def test_hours_come_from_the_same_model_and_from_the_cpu() -> None:
    def record(model: str, seconds: float, device: str = "cpu") -> dict:
        parameters = {"samples": 10, "runtime": "cpu"}
        stage = {"stage": "eval", "parameters": parameters, "cpu_seconds": seconds}
        return {"model": model, "environment": {"device": device}, "stages": [stage]}

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

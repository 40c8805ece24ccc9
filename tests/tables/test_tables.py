"""Tables: checks of their files, and finished cells, which never run again."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dqtool.errors import NumericError, UsageError
from dqtool.metrics import METRICS
from dqtool.stages.registry import option_types
from dqtool.stages.shared.settings import RunSettings
from dqtool.tables.__main__ import main
from dqtool.tables.cells import CellRecord, CellStore, claim
from dqtool.tables.planning import Target, plan_table
from dqtool.tables.rendering import render_markdown, summarise
from dqtool.tables.running import Runner
from dqtool.tables.spec import load_table

TABLES = sorted((Path(__file__).parents[2] / "recipes" / "tables").glob("*.yaml"))


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
        Runner, "_finish", lambda _self, cell: (ran.append(cell.key), store.save(cell.key, CellRecord([])))
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

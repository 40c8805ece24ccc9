from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from helpers import listing, load_json

from dqtool.errors import UsageError
from dqtool.recipe import load_recipe
from dqtool.stages.registry import chained_stages, option_types
from dqtool.stages.run import steps_of_recipe
from dqtool.stages.shared.paths import WRITTEN

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
RECIPE = """\
model: tiny
stages:
  dilate: {scaling: wd}
  calibrate: {steps: 4, samples: 16, scaling: auto}
  distill: {bits: 4/4, iters: 2, refine-iters: 2}
  export:
  eval: {samples: 4, grid: samples.png}
"""


@pytest.fixture
def recipe(chain: Path) -> Path:
    (chain / "small.yaml").write_text(RECIPE)
    return chain / "small.yaml"


def test_chains_the_stages_then_everything_is_cached_without_torch(run: Run, chain: Path, recipe: Path):
    result = run("run", "small.yaml", cwd=chain)
    assert (result.returncode, result.stdout) == (0, "results/small/eval.json\n"), result.stderr
    work = chain / "results" / "small"
    assert (work / "samples.png").is_file()
    # A recipe only names commands, so its artifacts equal those that the commands write.
    assert (work / "distilled.safetensors").read_bytes() == (chain / "distilled.safetensors").read_bytes()
    report = json.loads((work / "eval.json").read_text())
    assert report["inputs"][1]["name"] == "tiny"
    before = listing(chain)
    code = (
        "import sys; from dqtool.__main__ import main; code = main();"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules; sys.exit(code)"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, "run", "small.yaml", "--json"],
        cwd=chain,
        capture_output=True,
        text=True,
        timeout=9,
    )
    assert again.returncode == 0, again.stderr
    content = load_json(again.stdout)
    assert [stage["cached"] for stage in content["stages"]] == [True] * 5
    assert content["path"] == "results/small/eval.json"
    assert listing(chain) == before


def test_overrides_and_the_directory(run: Run, chain: Path, recipe: Path):
    result = run(
        "run", "small.yaml", "-o", "out", "--set", "distill.iters=0", "--set", "distill.output=./ptq.safetensors",
        "--set", "eval.metrics=[cost]", "--set", "eval.grid=g.png", cwd=chain,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (0, "out/eval.json\n"), result.stderr
    assert json.loads((chain / "ptq.json").read_text())["parameters"]["recipe"]["iters"] == 0
    report = json.loads((chain / "out" / "eval.json").read_text())
    assert report["parameters"]["metrics"] == ["cost"]
    assert (chain / "out" / "g.png").is_file()
    assert not (chain / "results").exists()


def test_a_recipe_may_stop_early_or_start_from_an_artifact(run: Run, chain: Path):
    (chain / "tail.yaml").write_text("model: distilled.safetensors\nstages:\n  export: {output: ./again}\n")
    result = run("run", "tail.yaml", cwd=chain)
    assert (result.returncode, result.stdout) == (0, "./again\n"), result.stderr


def test_dry_run_lists_the_stages_and_writes_nothing(run: Run, chain: Path, recipe: Path):
    before = listing(chain)
    result = run("run", "small.yaml", "--dry-run", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines() if "would write" in line] == list(
        chained_stages()
    )
    assert listing(chain) == before
    # Finished stages count as cached. The first unfinished one is planned in full, later ones by name.
    plan = load_json(
        run("run", "small.yaml", "-o", ".", "--set", "distill.bits=6/6", "--dry-run", "--json", cwd=chain).stdout
    )
    assert [stage["cached"] for stage in plan["stages"]] == [True, True, False, False, False]
    assert plan["stages"][2]["work"]["layers"]
    assert listing(chain) == before


def test_a_failing_stage_is_named_and_what_was_finished_stays(run: Run, chain: Path, recipe: Path):
    result = run("run", "small.yaml", "--set", "distill.steps=7", cwd=chain)
    assert (result.returncode, result.stdout) == (3, "")
    assert "distill: This artifact was calibrated for" in result.stderr
    assert (chain / "results/small/calibrated.safetensors").is_file()


def test_a_bad_option_of_a_late_stage_is_refused_before_the_first_runs(run: Run, chain: Path, recipe: Path):
    before = listing(chain)
    for setting, problem in (("distill.bits=9/4", "is not a bit width"), ("export.format=gguf", "unknown format")):
        result = run("run", "small.yaml", "--set", setting, cwd=chain)
        assert (result.returncode, result.stdout) == (2, "")
        assert f"{setting.split('.')[0]}: " in result.stderr
        assert problem in result.stderr
    assert listing(chain) == before


def options_of_eval(line: str, *overrides: str) -> dict[str, object]:
    """Options of the stage `eval` of a recipe in the working directory."""
    Path("words.yaml").write_text(f"model: tiny\nstages:\n  eval: {{{line}}}\n")
    ((_, options),) = steps_of_recipe("words.yaml", overrides)[1]
    return options


@pytest.mark.parametrize("word", ["on", "off", "auto"])
def test_choices_that_yaml_takes_for_booleans_are_words(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert options_of_eval(f"correction: {word}")["correction"] == word
    assert options_of_eval("", f"eval.correction={word}")["correction"] == word
    with pytest.raises(UsageError, match="correction needs a text, and 'false' is given.*quotes"):
        options_of_eval("correction: false")


@pytest.mark.parametrize("option", sorted(WRITTEN))
def test_a_bare_name_of_a_file_to_write_is_in_the_directory_of_the_run(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = option.replace("_", "-")
    assert options_of_eval(f"{name}: a.out")[option] == "results/words/a.out"
    assert options_of_eval("", f"eval.{name}=a.out")[option] == "results/words/a.out"
    for path in ("./a.out", "other/a.out", "/tmp/a.out"):
        assert options_of_eval(f"{name}: {path}")[option] == path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_of_the_repository_are_valid(path: Path):
    recipe = load_recipe(path, [], {stage: option_types(stage) for stage in chained_stages()})
    assert [stage for stage, _ in recipe.stages] == list(chained_stages())
    assert recipe.title


def test_there_are_recipes():
    assert {"digits-ddpm-w4a4", "digits-ddpm-w6a6", "digits-ddpm-w8a8"} <= {path.stem for path in RECIPES}

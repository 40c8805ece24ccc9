"""`--preset paper`: the paper's form in every manifest, and a refusal of artifacts that were made otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run
from helpers import refused

RECIPE = """\
model: tiny
preset: paper
stages:
  dilate:
  calibrate: {steps: 4, samples: 16}
  distill: {bits: 4/4, iters: 2}
"""


def parameters(directory: Path, stage: str) -> dict:
    return json.loads((directory / f"{stage}.json").read_text())["parameters"]


def check(directory: Path) -> None:
    assert parameters(directory, "dilated")["scaling"] == "wd"
    assert parameters(directory, "calibrated").get("scaling", "keep") == "keep"
    distilled = parameters(directory, "distilled")
    assert (distilled["method"], distilled["preset"], distilled["static"]) == ("bkd", "paper", False)
    assert (distilled["recipe"]["iters"], distilled["recipe"]["refine_iters"]) == (2, 0)
    assert "correct_images" not in distilled
    metrics = json.loads((directory / "distilled.json").read_text())["metrics"]
    assert not [name for name in metrics if name.startswith(("refine_", "prediction_"))]
    assert [layer["bits"] for layer in json.loads((directory / "distilled.json").read_text())["layers"]]


def test_a_recipe_of_the_preset_sets_every_stage(chain: Path, run: Run) -> None:
    (chain / "paper.yaml").write_text(RECIPE)
    result = run("run", "paper.yaml", "-o", "out", cwd=chain)
    assert result.returncode == 0, result.stderr
    check(chain / "out")


@pytest.mark.parametrize("setting", ["preset=paper", "distill.preset=paper"])
def test_the_command_line_sets_every_stage_of_a_recipe(chain: Path, run: Run, setting: str) -> None:
    (chain / "plain.yaml").write_text(RECIPE.replace("preset: paper\n", ""))
    result = run("run", "plain.yaml", "-o", "out", "--set", setting, cwd=chain)
    assert result.returncode == 0, result.stderr
    check(chain / "out")


def test_an_artifact_of_other_scaling_is_refused_with_what_to_type(chain: Path, run: Run) -> None:
    told = refused(run, chain, 3, "distill", "calibrated.safetensors", "--preset", "paper", "-o", "p.safetensors")
    assert "calibrated with --scaling auto" in told
    assert "dqtool dilate MODEL --scaling wd" in told
    assert run("dilate", "tiny", "--scaling", "none", "-o", "n.safetensors", cwd=chain).returncode == 0
    arguments = ("--scaling", "keep", "--steps", "4", "--samples", "16", "-o", "c.safetensors")
    assert run("calibrate", "n.safetensors", *arguments, cwd=chain).returncode == 0
    told = refused(run, chain, 3, "distill", "c.safetensors", "--preset", "paper", "-o", "p.safetensors")
    assert "not dilated by Weight Dilation" in told


@pytest.mark.parametrize("option", [("--method", "lsq"), ("--refine-iters", "3"), ("--correct-noise",), ("--static",)])
def test_contradicting_options_are_refused(chain: Path, run: Run, option: tuple[str, ...]) -> None:
    assert option[0] in refused(run, chain, 2, "distill", "calibrated.safetensors", "--preset", "paper", *option)


def test_an_unknown_preset_of_a_recipe_is_refused(chain: Path, run: Run) -> None:
    (chain / "paper.yaml").write_text(RECIPE.replace("paper", "rival"))
    assert "unknown preset 'rival'" in refused(run, chain, 2, "run", "paper.yaml")

"""`dqtool quantize`: one line out, five stages beside the output, a second run that does nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from conftest import Run
from families import dit_pipeline
from helpers import listing, load_json, refused, tiny_pipeline

from dqtool.stages.options.quantize import NOT_RECEIVED, RECEIVERS, QuantizeOptions

ARGUMENTS = ("quantize", "tiny", "-o", "out", "--effort", "fast", "--steps", "4", "--samples", "16")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, run: Run) -> Path:
    """A directory where `tiny` was quantized to `out`."""
    directory = tmp_path_factory.mktemp("quantize")
    tiny_pipeline(directory / "tiny")
    result = run(*ARGUMENTS, cwd=directory)
    assert (result.returncode, result.stdout) == (0, "out\n"), result.stderr
    for told in ("time: about", "memory: up to", "disk: about", "x smaller than float32", "ms a step", "dB to full"):
        assert told in result.stderr, result.stderr
    return directory


def test_a_pipeline_is_exported_and_the_work_files_lie_beside_it(quantized: Path) -> None:
    assert (quantized / "out" / "model_index.json").is_file()
    work = quantized / "out.work"
    assert sorted(path.name for path in work.glob("*.safetensors")) == [
        "calibrated.safetensors",
        "dilated.safetensors",
        "distilled.safetensors",
    ]
    assert (work / "samples.png").is_file()
    parameters = json.loads((work / "distilled.json").read_text())["parameters"]
    assert (parameters["method"], parameters["correct_images"]) == ("ptq", 64)
    assert json.loads((work / "calibrated.json").read_text())["parameters"]["steps"] == 4


def test_a_second_run_is_cached_without_torch_and_tells_the_same_summary(quantized: Path) -> None:
    before = listing(quantized)
    code = (
        "import sys; from dqtool.__main__ import main; code = main();assert 'torch' not in sys.modules; sys.exit(code)"
    )
    again = subprocess.run(
        [sys.executable, "-c", code, *ARGUMENTS, "--json"], cwd=quantized, capture_output=True, text=True, timeout=60
    )
    assert again.returncode == 0, again.stderr
    content = load_json(again.stdout)
    assert content["path"] == "out"
    assert [stage["cached"] for stage in content["stages"]] == [True] * 5
    summary = content["summary"]
    assert summary["bytes"] < summary["bytes_float32"]
    assert summary["psnr"] > 10
    assert summary["step_ms"] > 0 < summary["step_ms_float32"]
    assert summary["picture"] == "out.work/samples.png"
    assert listing(quantized) == before


def test_another_width_begins_at_distill_and_the_plan_says_so(quantized: Path, run: Run) -> None:
    before = listing(quantized)
    result = run(*ARGUMENTS, "--keep", "conv_in=8/8", "--dry-run", "--json", cwd=quantized)
    assert result.returncode == 0, result.stderr
    plan = load_json(result.stdout)
    assert [stage["cached"] for stage in plan["stages"]] == [True, True, False, False, False]
    assert set(plan["estimate"]) == {"time", "memory", "gpus", "disk"}
    assert plan["work_directory"] == "out.work"
    assert listing(quantized) == before


def test_efforts_differ_in_samples_and_iterations(tmp_path: Path, run: Run) -> None:
    tiny_pipeline(tmp_path / "tiny")
    found = {}
    for effort in ("default", "best"):
        result = run("quantize", "tiny", "--effort", effort, "--dry-run", "--json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        found[effort] = {stage["stage"]: stage["parameters"] for stage in load_json(result.stdout)["stages"]}
    assert "iters" not in found["default"]["distill"]
    assert found["best"]["distill"] == {"iters": 600, "refine_iters": 600}
    assert found["best"]["calibrate"] == {"samples": 10240}


@pytest.mark.parametrize("bits", ["8/8", "4/8", "auto"])
def test_another_width_than_the_default_reaches_every_stage_that_reads_it(tmp_path: Path, run: Run, bits: str) -> None:
    tiny_pipeline(tmp_path / "tiny")
    more = ("--target-psnr", "30") if bits == "auto" else ()
    result = run("quantize", "tiny", "--bits", bits, *more, "--dry-run", "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    found = {stage["stage"]: stage["parameters"] for stage in load_json(result.stdout)["stages"]}
    assert found["distill"]["bits"] == bits
    assert found["calibrate"].get("bits") == (None if bits == "auto" else bits)


def test_a_network_whose_pipeline_is_named(tmp_path: Path, run: Run) -> None:
    """The pipeline of a model without a text encoder is for `dilate` alone."""
    dit_pipeline(tmp_path / "dit")
    words = ("quantize", "dit/transformer", "--pipeline", "dit", "--effort", "fast", "--steps", "2", "--samples", "4")
    result = run(*words, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "exported\n"), result.stderr
    dry = run(*words, "--bits", "auto", "--low-rank", "2", "--target-psnr", "20", "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0, dry.stderr


def test_a_network_of_the_generic_family(tmp_path: Path, run: Run) -> None:
    """Its plan has the size and the estimates of the same network with its adapter."""
    tiny_pipeline(tmp_path / "tiny")
    plans = []
    for family in ((), ("--family", "generic", "--random-conditions")):
        words = ("quantize", "tiny", *family, "--steps", "2", "--samples", "4")
        result = run(*words, "--dry-run", "--json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        plans.append(load_json(result.stdout))
    known, generic = plans
    assert set(generic["estimate"]) == {"time", "memory", "gpus", "disk"}
    assert generic["estimate"]["disk"] == known["estimate"]["disk"]
    works = [next(s["work"] for s in plan["stages"] if s["stage"] == "distill") for plan in plans]
    assert works[1]["macs"] == works[0]["macs"] > 0
    result = run(*words, "--effort", "fast", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "exported\n"), result.stderr
    assert "time: about" in result.stderr


def test_no_stage_receives_an_option_that_it_refuses() -> None:
    for stage, owner in RECEIVERS.items():
        hints = get_type_hints(owner, include_extras=True)
        refused = {
            name for name, hint in hints.items() if any(getattr(each, "hidden", False) for each in get_args(hint))
        }
        shared = refused & {field.name for field in fields(QuantizeOptions)}
        assert shared <= {name for of, name in NOT_RECEIVED if of == stage}, stage


def test_a_finetune_takes_the_calibration_of_an_earlier_run(quantized: Path, tmp_path: Path, run: Run) -> None:
    shutil.copytree(quantized, tmp_path / "work")
    directory = tmp_path / "work"
    tiny_pipeline(directory / "tuned", seed=1)
    tail = ("--apply-to", "tuned", "--effort", "fast")
    result = run("quantize", "out", "-o", "two", *tail, cwd=directory)
    assert (result.returncode, result.stdout) == (0, "two\n"), result.stderr
    assert "trajectory" not in result.stderr
    mine, theirs = (json.loads((directory / f"{d}.work" / "calibrated.json").read_text()) for d in ("two", "out"))
    assert mine["model"]["source"] == "tuned"
    assert mine["pipeline"]["sampling"] == theirs["pipeline"]["sampling"]
    assert [entry["name"] for entry in mine["inputs"]] == [
        "two.work/dilated.safetensors",
        "out.work/calibrated.safetensors",
    ]
    assert (directory / "two" / "model_index.json").is_file()
    again = run("quantize", "out", "-o", "two", *tail, "--dry-run", "--json", cwd=directory)
    assert [stage["cached"] for stage in load_json(again.stdout)["stages"]] == [True] * 5
    whole = run("quantize", "tiny", "-o", "three", *tail, "--steps", "4", "--dry-run", "--json", cwd=directory)
    assert [stage["stage"] for stage in load_json(whole.stdout)["stages"]] == [
        *("dilate", "calibrate"),
        *("dilate", "calibrate", "distill", "export", "eval"),
    ]
    assert "already" in refused(run, directory, 2, "quantize", "out", "-o", "two", *tail, "--steps", "5")
    tiny_pipeline(directory / "wide", block_out_channels=(8, 24))
    last = refused(
        run, directory, 3, "calibrate", "out.work/dilated.safetensors", "--statistics", "out.work/dilated.safetensors"
    )
    assert "dilate" in last
    result = run("quantize", "out", "-o", "four", "--apply-to", "wide", "--effort", "fast", cwd=directory)
    assert result.returncode == 3 and "block_out_channels" in result.stderr.splitlines()[-1]
    assert not (directory / "four").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("tiny", "--effort", "much"), 2),
        (("tiny", "--bits", "9/9"), 2),
        (("tiny", "--sampler", "abacus"), 2),
        (("tiny", "-o", "tiny/inside"), 2),
        (("nowhere",), 4),
    ],
)
def test_refusals_have_the_code_of_their_stage_and_touch_nothing(
    tmp_path: Path, run: Run, arguments: tuple[str, ...], code: int
) -> None:
    tiny_pipeline(tmp_path / "tiny")
    refused(run, tmp_path, code, "quantize", *arguments)

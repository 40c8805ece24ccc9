"""Streams: one line on standard output, paths from pipes, JSON, and the cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import CHAIN, Run
from helpers import listing, load_json, tiny_pipeline

from dqtool.artifacts import read_manifest
from dqtool.stages.registry import chained_stages, default_output

OUTPUTS = [default_output(stage) for stage in chained_stages()]


def shell(script: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a bash script in which `dqtool` stands for this package."""
    prelude = f'set -o pipefail; dqtool() {{ "{sys.executable}" -m dqtool "$@"; }}; '
    return subprocess.run(["bash", "-c", prelude + script], cwd=cwd, capture_output=True, text=True)


class TestStandardOutput:
    @pytest.mark.parametrize(("arguments", "output"), zip(CHAIN, OUTPUTS, strict=True))
    def test_carries_the_path_and_nothing_else(self, run: Run, chain: Path, arguments: tuple[str, ...], output: str):
        result = run(*arguments, "--force", cwd=chain)
        assert result.returncode == 0, result.stderr
        assert result.stdout == f"{output}\n"
        assert output in result.stderr

    def test_the_path_is_printed_as_it_was_given(self, run: Run, chain: Path):
        (chain / "sub").mkdir()
        for path in ("./a.safetensors", "sub/../b.safetensors", str(chain / "c.safetensors")):
            assert run("dilate", "tiny", "-o", path, cwd=chain).stdout == f"{path}\n"

    def test_what_a_library_prints_or_warns_goes_elsewhere(
        self, run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def noisy(options: object, settings: object) -> str:
            print("progress of a library")
            warnings.warn("something is deprecated", FutureWarning, stacklevel=1)
            return "here"

        monkeypatch.setattr("dqtool.stages.export.export", noisy)
        with pytest.warns(FutureWarning):
            assert run("export", "--debug", cwd=chain).stdout == "here\n"
        result = run("export", cwd=chain)
        assert result.stdout == "here\n"
        assert result.stderr == "progress of a library\n"

    def test_our_own_warnings_are_shown(self, run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch):
        from dqtool.errors import DqtoolWarning

        def warning(options: object, settings: object) -> str:
            warnings.warn("look here", DqtoolWarning, stacklevel=1)
            return "here"

        monkeypatch.setattr("dqtool.stages.export.export", warning)
        assert run("export", cwd=chain).stderr == "warning: look here\n"

    def test_quiet_leaves_the_path_only(self, run: Run, chain: Path):
        result = run("dilate", "tiny", "--quiet", "--force", cwd=chain)
        assert (result.stdout, result.stderr) == ("dilated.safetensors\n", "")

    def test_eval_shows_its_table_on_standard_error_also_when_cached(self, run: Run, chain: Path):
        result = run(*CHAIN[-1], cwd=chain)
        assert result.stdout == "eval.json\n"
        assert "cached" in result.stderr
        assert "bit operations" in result.stderr

    def test_a_reader_that_leaves_early_is_no_error(self, made: Path):
        result = shell("dqtool inspect distilled.safetensors | head -n 1", made)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith("artifact")


class TestJson:
    @pytest.mark.parametrize(("arguments", "output"), zip(CHAIN, OUTPUTS, strict=True))
    def test_is_the_manifest_with_the_path_and_whether_it_was_cached(
        self, run: Run, chain: Path, arguments: tuple[str, ...], output: str
    ):
        content = load_json(run(*arguments, "--json", cwd=chain).stdout)
        assert content["path"] == output
        assert content["cached"] is True
        assert content["stage"] == arguments[0]
        assert content["fingerprint"] == read_manifest(chain / output).fingerprint

    def test_says_when_the_work_was_done(self, run: Run, chain: Path):
        assert load_json(run("export", "--force", "--json", cwd=chain).stdout)["cached"] is False

    def test_sample_and_zoo_get_have_no_manifest(self, run: Run, chain: Path):
        content = load_json(run("sample", "exported", "-n", "1", "--json", cwd=chain).stdout)
        assert content == {"path": "samples.png", "cached": False}


class TestCache:
    def test_another_schedule_reaches_the_stages_after_dilate(self, run: Run, tmp_path: Path):
        """The schedule stands in manifests alone: the dilated tensors are the same."""
        tiny_pipeline(tmp_path / "tiny")
        told = []
        for prediction_type in ("v_prediction", "epsilon", "epsilon"):
            assert run("dilate", "tiny", "--prediction-type", prediction_type, cwd=tmp_path).returncode == 0
            result = run("calibrate", "--steps", "2", "--samples", "4", "--json", cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            manifest = json.loads((tmp_path / "calibrated.json").read_text())
            told.append((load_json(result.stdout)["cached"], manifest["pipeline"]["scheduler"]["prediction_type"]))
        assert told == [(False, "v_prediction"), (False, "epsilon"), (True, "epsilon")]

    def test_a_rerun_is_cached_and_imports_no_torch(self, made: Path):
        code = f"""
import sys, time
from dqtool.__main__ import main
for arguments in {CHAIN!r}:
    sys.argv = ["dqtool", *arguments]
    start = time.process_time()
    assert main() == 0
    assert time.process_time() - start < 1
assert "torch" not in sys.modules and "diffusers" not in sys.modules and "numpy" not in sys.modules
"""
        before = listing(made)
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=made, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == OUTPUTS
        assert result.stderr.count("cached") == len(CHAIN)
        assert listing(made) == before

    def test_force_and_other_parameters_do_the_work_again_with_the_same_bytes(self, run: Run, chain: Path):
        before = (chain / "calibrated.safetensors").read_bytes()
        result = run(*CHAIN[1], "--force", cwd=chain)
        assert "cached" not in result.stderr
        assert (chain / "calibrated.safetensors").read_bytes() == before
        result = run(*CHAIN[1], "--seed", "1", cwd=chain)
        assert "cached" not in result.stderr
        assert (chain / "calibrated.safetensors").read_bytes() != before


class TestStandardInput:
    def test_a_path_comes_from_a_pipe_or_a_file(self, chain: Path):
        os.rename(chain / "calibrated.safetensors", chain / "elsewhere.safetensors")
        os.rename(chain / "calibrated.json", chain / "elsewhere.json")
        (chain / "line").write_text("elsewhere.safetensors\n")
        command = "dqtool distill --iters 2 --refine-iters 2"
        for script in (f"echo elsewhere.safetensors | {command}", f"{command} < line"):
            result = shell(script, chain)
            assert (result.returncode, result.stdout) == (0, "distilled.safetensors\n"), result.stderr
            assert "cached" in result.stderr

    @pytest.mark.parametrize("command", ["calibrate", "distill", "export", "eval"])
    def test_an_empty_pipe_is_never_a_default(self, made: Path, command: str):
        result = shell(f"true | dqtool {command}", made)
        assert (result.returncode, result.stdout) == (3, "")
        assert "brought no path" in result.stderr

    def test_dev_null_and_closed_input_mean_the_default_file(self, made: Path):
        for script in ("dqtool export < /dev/null", "dqtool export <&-"):
            result = shell(script, made)
            assert (result.returncode, result.stdout) == (0, "exported\n"), result.stderr

    def test_a_default_that_is_not_there_is_the_environment(self, run: Run, tmp_path: Path):
        result = run("distill", cwd=tmp_path)
        assert result.returncode == 4
        assert "calibrated.safetensors" in result.stderr

    def test_the_argument_wins_over_the_pipe(self, made: Path):
        result = shell("echo nonsense | dqtool export distilled.safetensors", made)
        assert (result.returncode, result.stdout) == (0, "exported\n"), result.stderr


class TestPipeline:
    def test_five_stages_in_one_line(self, made: Path, tmp_path: Path):
        """The pipeline of README works. Slow: five processes import torch."""
        script = (
            f"dqtool dilate {made}/tiny | dqtool calibrate --steps 4 --samples 16"
            " | dqtool distill --bits 4/4 --iters 2 --refine-iters 2 | dqtool export | dqtool eval --samples 4 --quiet"
        )
        result = shell(script, tmp_path)
        assert (result.returncode, result.stdout) == (0, "eval.json\n"), result.stderr
        for name in OUTPUTS[:3]:
            assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name
        weights = "exported/unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / weights).read_bytes() == (made / weights).read_bytes()

    def test_a_failure_upstream_does_not_pick_up_stale_files(self, made: Path):
        before = listing(made)
        result = shell('dqtool dilate gone | dqtool calibrate; echo "${PIPESTATUS[@]}"', made)
        assert result.stdout == "4 3\n"
        assert listing(made) == before


class TestDryRun:
    @pytest.mark.parametrize(("arguments", "output"), zip(CHAIN, OUTPUTS, strict=True))
    def test_prints_the_plan_and_writes_nothing(self, run: Run, made: Path, arguments: tuple[str, ...], output: str):
        before = listing(made)
        cached = run(*arguments, "--dry-run", cwd=made)
        fresh = run(*arguments, "--dry-run", "--force", cwd=made)
        assert (cached.returncode, fresh.returncode) == (0, 0), fresh.stderr
        assert f"{arguments[0]}: cached, nothing to do: {output}" in cached.stdout
        assert f"{arguments[0]}: would write: {output}" in fresh.stdout
        assert listing(made) == before

    def test_distill_says_the_exact_size_the_bits_and_the_operations(self, run: Run, made: Path):
        content = load_json(run(*CHAIN[2], "--dry-run", "--force", "--json", cwd=made).stdout)
        found = json.loads((made / "distilled.json").read_text())
        assert content["work"]["bytes"] == found["file"]["bytes"]
        assert [layer["bits"] for layer in content["work"]["layers"]] == [layer["bits"] for layer in found["layers"]]
        assert content["work"]["bops"] < content["work"]["bops_float32"] / 30
        assert content["seconds_before"] == found["seconds"]

    def test_still_refuses_what_the_run_would_refuse(self, run: Run, made: Path):
        assert run("distill", "--bits", "9/4", "--dry-run", cwd=made).returncode == 2
        assert run("distill", "--steps", "5", "--dry-run", cwd=made).returncode == 3
        assert run("dilate", "tiny", "-o", "gone/x.safetensors", "--dry-run", cwd=made).returncode == 4

    def test_sample_and_zoo(self, run: Run, made: Path):
        before = listing(made)
        assert "would write: samples.png" in run("sample", "exported", "--dry-run", cwd=made).stdout
        assert listing(made) == before

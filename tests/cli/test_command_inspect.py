from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run
from helpers import load_json, rewrite_weights, weights_of

from dqtool.stages.registry import chained_stages, default_output


@pytest.mark.parametrize(("stage", "path"), [(stage, default_output(stage)) for stage in chained_stages()])
def test_an_artifact_of_every_stage(run: Run, made: Path, stage: str, path: str):
    result = run("inspect", path, cwd=made)
    assert (result.returncode, result.stderr) == (0, "")
    pairs = dict(line.split(maxsplit=1) for line in result.stdout.split("\n\n")[0].splitlines())
    assert pairs["stage"] == stage
    assert pairs["network"].startswith("UNet2DModel")
    assert "43,600 weights" in result.stdout
    content = load_json(run("inspect", path, "--json", cwd=made).stdout)
    assert (content["kind"], content["stage"], content["path"]) == ("artifact", stage, path)
    assert content["bytes"] > 0
    assert len(content["sha256"]) == 64


def test_bits_dilation_and_errors_are_columns_of_the_layers(run: Run, made: Path):
    text = run("inspect", "eval.json", cwd=made).stdout
    header = next(line for line in text.splitlines() if line.startswith("layer "))
    assert header.split("  ")[0] == "layer"
    assert all(column in header for column in ("bits", "unsaturated", "mean 1/s", "MACs", "layer_errors"))
    row = next(line for line in text.splitlines() if line.startswith("conv_in "))
    assert "8/8" in row
    assert "weights at 4/4" in text


@pytest.mark.parametrize("path", ["tiny", "tiny/unet", "tiny/unet/diffusion_pytorch_model.safetensors"])
def test_a_model(run: Run, made: Path, path: str):
    content = load_json(run("inspect", path, "--json", cwd=made).stdout)
    assert content["kind"] == "model"
    assert content["parameters_total"] == 44969
    assert content["pipeline"] == ("DDIMPipeline" if path == "tiny" else None)
    assert "44,969 in 144 tensors" in run("inspect", path, cwd=made).stdout


def test_needs_no_torch(made: Path):
    code = (
        "import sys; from dqtool.__main__ import main; code = main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    for path in ("tiny", "distilled.safetensors", "exported", "eval.json"):
        subprocess.run([sys.executable, "-c", code, "inspect", path], cwd=made, check=True, stdout=subprocess.DEVNULL)


def test_damage_and_strangers(run: Run, chain: Path):
    assert run("inspect", "gone", cwd=chain).returncode == 4
    assert run("inspect", "distilled.json", cwd=chain).returncode == 3
    (chain / "notes.txt").write_text("hello")
    assert run("inspect", "notes.txt", cwd=chain).returncode == 3
    data = (chain / "distilled.safetensors").read_bytes()
    (chain / "distilled.safetensors").write_bytes(data[:-1])
    result = run("inspect", "distilled.safetensors", cwd=chain)
    assert result.returncode == 3
    assert "truncated" in result.stderr


def test_a_foreign_json_beside_weights_is_no_manifest(run: Run, chain: Path):
    source = weights_of(chain / "tiny")
    source.with_suffix(".json").write_text('{"notes": "of the trainer"}')
    rewrite_weights(chain / "tiny", {})
    assert load_json(run("inspect", str(source), "--json", cwd=chain).stdout)["kind"] == "model"

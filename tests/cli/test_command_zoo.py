from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import listing, load_json, tiny_pipeline, weights_of
from safetensors.torch import load_file

from dqtool.models.sources import resolve


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a zoo of one model, stored like those of the package: in half precision, with a card."""
    zoo = tmp_path_factory.mktemp("zoo")
    tiny_pipeline(zoo / "tiny-ddpm", dtype=torch.float16)
    (zoo / "tiny-ddpm" / "card.json").write_text(json.dumps({"description": "random weights", "like": "nothing"}))
    return zoo


@pytest.fixture(autouse=True)
def zoo(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resolve, "ZOO", packaged)
    return packaged / "tiny-ddpm"


def test_list(run: Run, tmp_path: Path, zoo: Path):
    text = run("zoo", "list", cwd=tmp_path).stdout
    row = text.splitlines()[2]
    assert all(part in row for part in ("tiny-ddpm", "UNet2DModel", "44,969", "MB", "random weights"))
    [model] = load_json(run("zoo", "list", "--json", cwd=tmp_path).stdout)["models"]
    assert model["bytes"] < 4 * 44969
    assert model["like"] == "nothing"


@pytest.mark.parametrize("name", ["tiny-ddpm", "zoo:tiny-ddpm"])
def test_get_writes_an_ordinary_float32_pipeline(run: Run, tmp_path: Path, zoo: Path, name: str):
    from diffusers import DiffusionPipeline

    result = run("zoo", "get", name, "-o", "model", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "model\n"), result.stderr
    halves, floats = load_file(weights_of(zoo)), load_file(weights_of(tmp_path / "model"))
    assert all(floats[key].dtype == torch.float32 for key in floats)
    assert all(torch.equal(floats[key], halves[key].float()) for key in halves)
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert not (tmp_path / "model" / "card.json").exists()
    assert weights_of(tmp_path / "model").stat().st_mode & 0o044 == 0o044 & ~umask()
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipeline.unet.dtype == torch.float32


def test_the_default_directory_is_the_name_and_a_rerun_is_cached(run: Run, tmp_path: Path):
    assert run("zoo", "get", "tiny-ddpm", cwd=tmp_path).stdout == "tiny-ddpm\n"
    before = listing(tmp_path)
    result = run("zoo", "get", "tiny-ddpm", "--json", cwd=tmp_path)
    assert load_json(result.stdout) == {"path": "tiny-ddpm", "cached": True}
    assert listing(tmp_path) == before


def test_dilating_the_embedded_model_equals_dilating_the_copy(run: Run, tmp_path: Path):
    assert run("zoo", "get", "tiny-ddpm", "-o", "model", cwd=tmp_path).returncode == 0
    for model, output in (("zoo:tiny-ddpm", "a.safetensors"), ("model", "b.safetensors")):
        assert run("dilate", model, "-o", output, cwd=tmp_path).returncode == 0
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_never_overwrites_anything_else(run: Run, tmp_path: Path, force: tuple[str, ...]):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    before = listing(tmp_path)
    for target in ("full", "file", "missing/model", "."):
        result = run("zoo", "get", "tiny-ddpm", "-o", target, *force, cwd=tmp_path)
        assert (result.returncode, result.stdout) == (4, ""), target
    assert listing(tmp_path) == before


def test_an_empty_directory_is_taken(run: Run, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert run("zoo", "get", "tiny-ddpm", "-o", "empty", cwd=tmp_path).returncode == 0
    assert (tmp_path / "empty" / "model_index.json").is_file()


@pytest.mark.parametrize("name", ["nothing", "", "../tiny-ddpm", "."])
def test_an_unknown_name_says_which_there_are(run: Run, tmp_path: Path, name: str):
    result = run("zoo", "get", name, "-o", "model", cwd=tmp_path)
    assert result.returncode == 4
    assert "zoo:tiny-ddpm" in result.stderr
    assert listing(tmp_path) == {}


def test_dry_run(run: Run, tmp_path: Path):
    result = run("zoo", "get", "tiny-ddpm", "-o", "model", "--dry-run", cwd=tmp_path)
    assert "unet/diffusion_pytorch_model.safetensors" in result.stdout
    assert listing(tmp_path) == {}


def umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_components_name_the_precision_that_they_are_written_in(run: Run, packaged: Path, tmp_path: Path):
    """A text encoder in half precision would not fit the float32 network of the pipeline."""
    config = packaged / "tiny-ddpm" / "unet" / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "dtype": "float16"}))
    result = run("zoo", "get", "tiny-ddpm", "-o", "tiny", cwd=tmp_path)
    config.write_text(before)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "tiny" / "unet" / "config.json").read_text())["dtype"] == "float32"

"""Names that a user may give for a model, and the files that they resolve to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import text_pipeline
from helpers import NETWORK, tiny_pipeline
from original_networks import DdimModel, randomize

from dqtool.artifacts import read_manifest
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.sources.resolve import resolve_model, resolve_recorded
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.shared.settings import RunSettings


def hub_cache(home: Path, name: str, model: Path, revision: str = "main") -> Path:
    """Put a model into a Hub cache as huggingface_hub lays it out; returns the snapshot."""
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(model, snapshot)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(snapshot.name)
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, and no network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hf"


def test_a_hub_id_is_taken_from_the_local_cache(hub: Path, tmp_path: Path, run: Any) -> None:
    snapshot = hub_cache(hub, "someone/tiny-ddpm", tiny_pipeline(tmp_path / "tiny"))
    source = resolve_model("someone/tiny-ddpm")
    assert source.pipeline == snapshot
    assert source.sha256() == resolve_model(str(tmp_path / "tiny")).sha256()
    result = run("dilate", "someone/tiny-ddpm", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert resolve_recorded(read_manifest(tmp_path / "dilated.safetensors").network).sha256() == source.sha256()


def test_a_revision_can_be_named(hub: Path, tmp_path: Path) -> None:
    hub_cache(hub, "someone/tiny", tiny_pipeline(tmp_path / "tiny"), revision="v2")
    assert resolve_model("someone/tiny@v2").class_name == "UNet2DModel"
    with pytest.raises(EnvironmentFault):
        resolve_model("someone/tiny")


def test_a_directory_goes_before_a_hub_id(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(hub, "models/tiny", tiny_pipeline(tmp_path / "other", seed=1))
    tiny_pipeline(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert resolve_model("models/tiny").pipeline == Path("models/tiny")


def test_offline_and_not_cached_says_so(hub: Path, tmp_path: Path, run: Any) -> None:
    result = run("dilate", "someone/absent", cwd=tmp_path)
    assert result.returncode == 4
    assert "HF_HUB_OFFLINE" in result.stderr
    assert "no such file" in result.stderr


def test_components_choose_the_network(tmp_path: Path) -> None:
    pipeline = tiny_pipeline(tmp_path / "two")
    other = tiny_pipeline(tmp_path / "other", seed=1)
    shutil.copytree(other / "unet", pipeline / "transformer_2")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "transformer_2": ["diffusers", "UNet2DModel"]}))
    assert resolve_model(str(pipeline)).component == "unet"
    second = resolve_model(str(pipeline), component="transformer_2")
    assert second.weights[0].parent.name == "transformer_2"
    record = second.pipeline_record()
    assert record is not None
    assert record.component == "transformer_2"
    with pytest.raises(UsageError, match="no component") as caught:
        resolve_model(str(pipeline), component="transformer")
    assert "transformer_2" in str(caught.value)
    for bare in (pipeline / "unet", pipeline / "unet" / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(UsageError):
            resolve_model(str(bare), component="unet")


def test_an_original_checkpoint_goes_through_the_command_line(tmp_path: Path, run: Any) -> None:
    """Names as in diffusers, its own noise schedule, and a plan that reads no weights."""
    original = randomize(DdimModel(ch=32, ch_mult=(1, 2), blocks=1))
    torch.save(original.state_dict(), tmp_path / "model-790000.ckpt")
    plan = run("dilate", "model-790000.ckpt", "--dry-run", "--json", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    work = json.loads(plan.stdout)["work"]
    assert (work["network"], work["weights"]) == ("UNet2DModel", sum(p.numel() for p in original.parameters()))
    described = run("inspect", "model-790000.ckpt", "--json", cwd=tmp_path)
    assert described.returncode == 0, described.stderr
    assert json.loads(described.stdout)["dtypes"] == ["F32"]
    result = run("dilate", "model-790000.ckpt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "dilated.safetensors")
    assert manifest.pipeline is not None
    assert manifest.pipeline.scheduler["beta_end"] == 0.02
    result = run("calibrate", "--steps", "2", "--samples", "2", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_config_given_for_a_file_wins(tmp_path: Path) -> None:
    tiny = tiny_pipeline(tmp_path / "tiny")
    (tmp_path / "c.json").write_text(json.dumps({"_class_name": "UNet2DModel", **NETWORK, "sample_size": 16}))
    source = resolve_model(str(tiny / "unet" / "diffusion_pytorch_model.safetensors"), str(tmp_path / "c.json"))
    assert source.config["sample_size"] == 16


def test_what_stays_float_is_not_taken_for_a_denoiser(tmp_path: Path) -> None:
    pipeline = text_pipeline("sd", tmp_path / "sd")
    with pytest.raises(UsageError, match="stays float"):
        resolve_model(str(pipeline), component="text_encoder")
    with pytest.raises(UsageError, match="One component at a time"):
        resolve_model(str(pipeline), component="unet,vae")
    with pytest.raises(ArtifactError, match="AutoencoderKL is no denoiser"):
        dilate(DilateOptions(str(pipeline), str(tmp_path / "d.safetensors"), components="vae"), RunSettings(quiet=True))


def test_a_second_network_is_quantized_after_the_first(tmp_path: Path) -> None:
    """The exported directory is a pipeline again, whose other denoiser is still float."""
    pipeline = tiny_pipeline(tmp_path / "two")
    shutil.copytree(tiny_pipeline(tmp_path / "other", seed=1) / "unet", pipeline / "transformer_2")
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps({**index, "transformer_2": ["diffusers", "UNet2DModel"]}))
    model, quiet = str(pipeline), RunSettings(quiet=True)
    for component in ("unet", "transformer_2"):
        at = {stage: str(tmp_path / f"{component}-{stage}.safetensors") for stage in ("dilated", "calibrated", "ptq")}
        dilate(DilateOptions(model, at["dilated"], components=component), quiet)
        calibrate(CalibrateOptions(at["dilated"], at["calibrated"], steps=2, samples=2), quiet)
        distill(DistillOptions(at["calibrated"], at["ptq"], iters=0), quiet)
        model = export(ExportOptions(at["ptq"], str(tmp_path / f"{component}-exported")), quiet)
    for component in ("unet", "transformer_2"):
        config = json.loads((tmp_path / "transformer_2-exported" / component / "config.json").read_text())
        assert config["quantization_config"]["quant_method"] == "dqtool"
    first = (tmp_path / "unet-exported" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert (tmp_path / "transformer_2-exported" / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == first
    with pytest.raises(ArtifactError, match="quantized already"):
        resolve_model(model, component="unet")

"""An exported directory through diffusers: the same network, bit for bit, and byte for byte when saved again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dqtool
from dqtool.errors import ArtifactError


@pytest.fixture(scope="module")
def exported(made: Path) -> Path:
    return made / "exported"


def asked(runtime: str) -> Any:
    """A pipeline's quantization config that asks for this runtime of the UNet."""
    from diffusers import PipelineQuantizationConfig

    return PipelineQuantizationConfig(quant_mapping={"unet": dqtool.DqtoolConfig(runtime=runtime)})


def test_both_ways_of_loading_equal_the_distilled_network(exported: Path, made: Path) -> None:
    from diffusers import DiffusionPipeline

    from dqtool.artifacts import open_artifact
    from dqtool.stages.eval import network_of_artifact

    distilled = network_of_artifact(open_artifact(made / "distilled.safetensors"), "simulate")
    loaded = dqtool.load(str(exported), runtime="simulate")
    pipeline = DiffusionPipeline.from_pretrained(str(exported), quantization_config=asked("simulate"))
    assert type(pipeline).__name__ == "DDIMPipeline"
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    for timestep in distilled.timesteps.tolist():
        with torch.no_grad():
            expected = distilled(x, timestep).sample
            assert torch.equal(loaded(x, timestep).sample, expected)
            assert torch.equal(pipeline.unet(x, timestep).sample, expected)


def test_save_load_save_is_byte_identical(exported: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    network = UNet2DModel.from_pretrained(str(exported / "unet"))
    network.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (exported / "unet" / name).read_bytes()
    twice = UNet2DModel.from_pretrained(str(tmp_path / "again"))
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(network(x, 999).sample, twice(x, 999).sample)


def test_scales_stay_float32_under_torch_dtype(exported: Path) -> None:
    from diffusers import UNet2DModel

    simulated = dqtool.DqtoolConfig(runtime="simulate")
    network = UNet2DModel.from_pretrained(
        str(exported / "unet"), torch_dtype=torch.float16, quantization_config=simulated
    )
    assert network.conv_in.weight_scale.dtype == torch.float32
    assert network.conv_norm_out.weight.dtype == torch.float16
    with torch.no_grad():
        assert network(torch.randn(1, 1, 8, 8).half(), 999).sample.dtype == torch.float16


def test_pipeline_call_gives_images(exported: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(exported))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images
    assert len(images) == 2


@pytest.mark.parametrize("edit", ["newer", "missing"])
def test_what_does_not_fit_is_refused(exported: Path, tmp_path: Path, edit: str) -> None:
    from diffusers import UNet2DModel

    directory = tmp_path / "unet"
    shutil.copytree(exported / "unet", directory)
    config = json.loads((directory / "config.json").read_text())
    if edit == "newer":
        config["quantization_config"]["format"] = "dqtool/9"
    else:
        config["quantization_config"]["layers"] = config["quantization_config"]["layers"][:-1]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError):
        UNet2DModel.from_pretrained(str(directory))


def test_exports_from_when_predictions_had_two_tables_load(exported: Path, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    found = {}
    for name in ("plain", "corrected"):
        directory = tmp_path / name
        shutil.copytree(exported / "unet", directory)
        weights = directory / "diffusion_pytorch_model.safetensors"
        config = json.loads((directory / "config.json").read_text())
        state = {k: v for k, v in load_file(weights).items() if not k.startswith("prediction.")}
        config["quantization_config"].pop("prediction", None)
        if name == "corrected":
            config["quantization_config"]["prediction"] = [1, 1, 1]
            rows = torch.ones(len(state["timesteps"]), 1, 1, 1)
            state |= {"prediction.scale": 2 * rows, "prediction.bias": 0.5 * rows}
        (directory / "config.json").write_text(json.dumps(config))
        save_file(state, weights)
        found[name] = UNet2DModel.from_pretrained(str(directory))
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(found["corrected"](x, 999).sample, 2 * found["plain"](x, 999).sample + 0.5, atol=1e-6)

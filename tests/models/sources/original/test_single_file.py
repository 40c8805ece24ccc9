"""Single files of Stable Diffusion give the published configs, schedules and prediction types, from shapes or what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from original_networks import UNetModel, randomize
from safetensors.torch import save_file
from torch import Tensor

from dqtool.artifacts import read_manifest
from dqtool.errors import ArtifactError, UsageError
from dqtool.models.sources.hints import ModelHints
from dqtool.models.sources.original import LAYOUTS, Description, Known
from dqtool.models.sources.resolve import resolve_model

SD1 = {"model_channels": 320, "channel_mult": (1, 2, 4, 4), "attention": (1, 2, 4), "heads": 8, "context": 768}
SD2 = {**SD1, "context": 1024, "linear": True, "heads": None, "head_channels": 64}
SDXL = {
    "model_channels": 320,
    "channel_mult": (1, 2, 4),
    "attention": (2, 4),
    "head_channels": 64,
    "context": 2048,
    "linear": True,
    "depths": (0, 2, 10),
    "mid_depth": 10,
    "vector": 2816,
}
REFINER = {
    "model_channels": 384,
    "channel_mult": (1, 2, 4, 4),
    "attention": (2, 4),
    "head_channels": 64,
    "context": 1280,
    "linear": True,
    "depths": (0, 4, 4, 0),
    "mid_depth": 4,
    "vector": 2560,
}

_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_SD1 = {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS, _CROSS, _CROSS, _PLAIN],
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "use_linear_projection": False,
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "transformer_layers_per_block": 1,
}
_SD2 = {**_SD1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
_XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "use_linear_projection": True,
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "sd1": (SD1, _SD1, 859_520_964),
    "sd1-inpainting": ({**SD1, "in_channels": 9, "out_channels": 4}, {**_SD1, "in_channels": 9}, 859_535_364),
    "sd1-pix2pix": ({**SD1, "in_channels": 8, "out_channels": 4}, {**_SD1, "in_channels": 8}, 859_532_484),
    "sd2": (SD2, _SD2, 865_910_724),
    "sdxl": (
        SDXL,
        {
            **_XL,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": [_PLAIN, _CROSS, _CROSS],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": [1, 2, 10],
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
    ),
    "sdxl-refiner": (
        REFINER,
        {
            **_XL,
            "block_out_channels": [384, 768, 1536, 1536],
            "down_block_types": [_PLAIN, _CROSS, _CROSS, _PLAIN],
            "attention_head_dim": [6, 12, 24, 24],
            "cross_attention_dim": 1280,
            "transformer_layers_per_block": 4,
            "projection_class_embeddings_input_dim": 2560,
        },
        2_259_526_660,
    ),
}


def described(state: dict[str, Tensor], published: dict[str, Any] | None = None, **told: Any) -> Description:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layout = next(each for each in LAYOUTS.values() if each.matches(shapes))
    return layout.describe(shapes, Known(published, **told), "model.safetensors")


def on_meta(options: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {f"model.diffusion_model.{k}": v for k, v in UNetModel(**options).state_dict().items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_are_known_by_their_shapes(name: str) -> None:
    """Config, head counts and parameters; the converted names and shapes are diffusers' own."""
    from diffusers import UNet2DConditionModel

    options, expected, parameters = PUBLISHED[name]
    state = on_meta(options)
    found = described(state)
    assert {key: found.config.get(key) for key in expected} == expected
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(found.config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    converted = LAYOUTS["stable-diffusion"].convert(state, found.config, name)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_diffusers_takes_the_same_file_for_the_same_model() -> None:
    """Its own inference of the model's kind, which names the published config, agrees with the table here."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    beside = {
        "sdxl": {"conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)},
        "sdxl-refiner": {"conditioner.embedders.0.model.transformer.resblocks.9.mlp.c_proj.bias": torch.zeros(1)},
    }
    kinds = {
        name: infer_diffusers_model_type({**on_meta(options), **beside.get(name, {})})
        for name, (options, _, _) in PUBLISHED.items()
    }
    assert kinds == {
        "sd1": "v1",
        "sd1-inpainting": "inpainting",
        "sd1-pix2pix": "instruct-pix2pix",
        "sd2": "v2",
        "sdxl": "xl_base",
        "sdxl-refiner": "xl_refiner",
    }


def test_layers_of_different_depth_are_read_one_by_one() -> None:
    """SSD-1B: no transformer in the middle, and decoder layers with other depths than the encoder's."""
    from diffusers import UNet2DConditionModel

    state = on_meta({**SDXL, "depths": (0, 2, 4), "mid_depth": 0})
    removed = [("output_blocks.1.1", 4), ("output_blocks.2.1", 4), ("output_blocks.4.1", 1), ("output_blocks.5.1", 1)]
    for block, depth in removed:
        keep = f"model.diffusion_model.{block}.transformer_blocks."
        state = {k: v for k, v in state.items() if not k.startswith(keep) or int(k[len(keep) :].split(".")[0]) < depth}
    first = "model.diffusion_model.output_blocks.0.1.transformer_blocks."
    for name, tensor in list(state.items()):
        if name.startswith(first + "0."):
            state |= {f"{first}{index}.{name[len(first) + 2 :]}": tensor for index in range(4, 10)}
    found = described(state)
    assert found.config["mid_block_type"] == "UNetMidBlock2D"
    assert found.config["attention_head_dim"] == [5, 10, 20]
    assert found.config["transformer_layers_per_block"] == [1, [2, 2], [4, 4]]
    assert found.config["reverse_transformer_layers_per_block"] == [[10, 4, 4], [2, 1, 1], [1, 1, 1]]
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(found.config)
    converted = LAYOUTS["stable-diffusion"].convert(state, found.config, "ssd-1b")
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in network.state_dict().items()}
    heads = {module.heads for name, module in network.named_modules() if name.endswith("attn1")}
    assert heads == {10, 20}


def test_an_unknown_architecture_is_asked_for() -> None:
    state = on_meta({**SD1, "context": 640})
    with pytest.raises(ArtifactError, match="heads can't be derived") as caught:
        described(state)
    assert "--config" in str(caught.value)
    yaml_config = {"model": {"params": {"unet_config": {"params": {"num_heads": 4}}}}}
    assert described(state, yaml_config).config["attention_head_dim"] == 4


# ------------------------------------------------------------------------------- prediction type and schedule

TINY1 = {"model_channels": 32, "channel_mult": (1, 2), "attention": (1,), "heads": 8, "context": 768, "blocks": 1}
TINY2 = {**TINY1, "model_channels": 64, "heads": None, "head_channels": 64, "context": 1024, "linear": True}


def tiny_file(path: Path, options: dict[str, Any], **beside: Tensor) -> str:
    network = randomize(UNetModel(**options))
    state = {f"model.diffusion_model.{k}": v.clone() for k, v in network.state_dict().items()}
    save_file({**state, **beside}, path)
    return str(path)


def schedule(given: str, config: str | None = None, **told: Any) -> dict[str, Any]:
    found = resolve_model(given, config, hints=ModelHints(**told))
    found.check_schedule()
    return found.scheduler or {}


def test_marker_keys_say_v_prediction(tmp_path: Path) -> None:
    plain = schedule(tiny_file(tmp_path / "plain.safetensors", TINY1))
    assert plain["prediction_type"] == "epsilon"
    assert "rescale_betas_zero_snr" not in plain
    v = schedule(tiny_file(tmp_path / "v.safetensors", TINY1, v_pred=torch.zeros(0)))
    assert (v["prediction_type"], v.get("timestep_spacing")) == ("v_prediction", None)
    marked = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    zero = schedule(tiny_file(tmp_path / "z.safetensors", TINY1, **marked))
    assert zero["prediction_type"] == "v_prediction"
    assert (zero["rescale_betas_zero_snr"], zero["timestep_spacing"]) == (True, "trailing")
    with pytest.raises(ArtifactError, match="without signal"):
        schedule(str(tmp_path / "z.safetensors"), prediction_type="epsilon")


def test_edm_keys_say_an_edm_schedule(tmp_path: Path) -> None:
    playground = tiny_file(tmp_path / "p.safetensors", TINY1, edm_mean=torch.zeros(4), edm_std=torch.ones(4))
    assert schedule(playground)["_class_name"] == "EDMDPMSolverMultistepScheduler"
    sigma = {"edm_vpred.sigma_max": torch.tensor(120.0)}
    cos = schedule(tiny_file(tmp_path / "c.safetensors", TINY1, **sigma))
    assert (cos["_class_name"], cos["sigma_max"], cos["prediction_type"]) == (
        "EDMEulerScheduler",
        120.0,
        "v_prediction",
    )


@pytest.mark.parametrize(("word", "kind"), [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
def test_a_yaml_says_what_is_predicted(tmp_path: Path, word: str, kind: str) -> None:
    given = tiny_file(tmp_path / "m.safetensors", TINY2)
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"params": {"parameterization": word}}}))
    found = schedule(given, str(tmp_path / "m.yaml"))
    assert found["prediction_type"] == kind
    assert resolve_model(given, str(tmp_path / "m.yaml")).config["sample_size"] == (96 if word == "v" else 64)


def test_a_stability_yaml_says_it_by_its_scaling(tmp_path: Path) -> None:
    given = tiny_file(tmp_path / "m.safetensors", TINY2)
    scaling = {"target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"}
    params = {"denoiser_config": {"params": {"scaling_config": scaling}}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))
    assert schedule(given, str(tmp_path / "m.yaml"))["prediction_type"] == "v_prediction"


def test_what_a_stable_diffusion_2_file_predicts_is_asked_for(tmp_path: Path, run: Any) -> None:
    given = tiny_file(tmp_path / "m.safetensors", TINY2)
    result = run("dilate", given, cwd=tmp_path)
    assert result.returncode == 2
    assert "--prediction-type" in result.stderr
    assert run("inspect", given, cwd=tmp_path).returncode == 0
    result = run("dilate", given, "--prediction-type", "v_prediction", "--scaling", "none", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "dilated.safetensors")
    assert manifest.pipeline is not None
    assert manifest.pipeline.scheduler["prediction_type"] == "v_prediction"
    assert manifest.network.config["sample_size"] == 96
    assert manifest.network.source_told == {"prediction_type": "v_prediction"}
    with pytest.raises(UsageError, match="no prediction type"):
        ModelHints("v")


def test_a_schedule_can_be_named(tmp_path: Path) -> None:
    from diffusers import EulerDiscreteScheduler

    EulerDiscreteScheduler(beta_end=0.02, prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
    given = tiny_file(tmp_path / "m.safetensors", TINY2)
    for named in (tmp_path / "scheduler", tmp_path / "scheduler" / "scheduler_config.json", tmp_path):
        found = schedule(given, scheduler=str(named))
        assert (found["_class_name"], found["prediction_type"]) == ("EulerDiscreteScheduler", "v_prediction")
    assert schedule(given, scheduler=str(tmp_path), prediction_type="sample")["prediction_type"] == "sample"
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ArtifactError, match="no config of a diffusers scheduler"):
        schedule(given, scheduler=str(tmp_path / "other.json"))


def bare(path: Path, **config: Any) -> str:
    """A component directory of a network whose weights do not matter here."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, path / "diffusion_pytorch_model.safetensors")
    return str(path)


def test_a_bare_component_is_not_given_a_schedule_by_guess(tmp_path: Path) -> None:
    flow = bare(tmp_path / "flow", _class_name="AuraFlowTransformer2DModel")
    with pytest.raises(UsageError, match="flow matching") as caught:
        schedule(flow)
    assert "--scheduler" in str(caught.value)
    flow_config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.73}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(flow_config))
    assert schedule(flow, scheduler=str(tmp_path)) == flow_config
    with pytest.raises(UsageError, match="--prediction-type"):
        schedule(flow, scheduler=str(tmp_path), prediction_type="epsilon")
    with pytest.raises(UsageError, match="--scheduler"):
        schedule(flow, prediction_type="flow_prediction")
    assert schedule(bare(tmp_path / "sd3", _class_name="SD3Transformer2DModel")) == {}  # its family knows
    sd1 = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "cross_attention_dim": 768}
    assert schedule(bare(tmp_path / "sd1", **sd1))["beta_schedule"] == "scaled_linear"
    sd2 = {**sd1, "cross_attention_dim": 1024, "use_linear_projection": True}
    with pytest.raises(UsageError, match="--prediction-type"):
        schedule(bare(tmp_path / "sd2", **sd2))
    assert schedule(str(tmp_path / "sd2"), prediction_type="v_prediction")["prediction_type"] == "v_prediction"

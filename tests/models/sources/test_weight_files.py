"""Weights under all names that diffusers and trainers give them: variants, shards, pickles, prefixes, scaled fp8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import component_directory, text_pipeline
from helpers import tiny_pipeline
from safetensors.torch import load_file, save_file

from dqtool.errors import ArtifactError, UsageError
from dqtool.models.components.companions import companions_of_source
from dqtool.models.networks.loading import build_network, load_weights
from dqtool.models.sources.hints import ModelHints
from dqtool.models.sources.resolve import resolve_model

PLAIN = "diffusion_pytorch_model.safetensors"


def component(path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A bare UNet2DModel and its tensors."""
    made = component_directory("unet2d", path)
    return made, {name: tensor.clone() for name, tensor in load_file(made / PLAIN).items()}


def loaded(path: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    return load_weights(resolve_model(str(path), hints=ModelHints(variant=variant)))


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], scale: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name] * scale)


def test_a_variant_is_chosen_by_name(tmp_path: Path) -> None:
    made, state = component(tmp_path / "unet")
    for index, variant in enumerate(("fp16", "bf16", "non_ema", "ema"), 2):
        save_file({k: v * index for k, v in state.items()}, made / f"diffusion_pytorch_model.{variant}.safetensors")
    assert_equal(loaded(made), state)
    assert_equal(loaded(made, "fp16"), state, 2)
    assert_equal(loaded(made, "ema"), state, 5)
    with pytest.raises(UsageError, match="no variant 'fp8'") as caught:
        resolve_model(str(made), hints=ModelHints(variant="fp8"))
    assert "non_ema" in str(caught.value)
    (made / PLAIN).unlink()
    with pytest.raises(UsageError, match="several variants only") as caught:
        resolve_model(str(made))
    assert "--variant" in str(caught.value)


@pytest.mark.parametrize("variant", ["fp16", "bf16", None])
def test_shards_as_diffusers_writes_them(tmp_path: Path, variant: str | None) -> None:
    from diffusers import UNet2DModel

    made, state = component(tmp_path / "unet")
    network = UNet2DModel.from_pretrained(made)
    network.save_pretrained(tmp_path / "sharded", max_shard_size="20KB", variant=variant)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_equal(loaded(tmp_path / "sharded"), state)  # the only variant
    assert_equal(loaded(tmp_path / "sharded", variant), state)


def test_an_index_names_files_of_its_directory_only(tmp_path: Path) -> None:
    made, _ = component(tmp_path / "unet")
    (made / PLAIN).rename(tmp_path / PLAIN)
    index = made / f"{PLAIN}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": f"../{PLAIN}"}}))
    with pytest.raises(ArtifactError, match="can not be used as a path"):
        resolve_model(str(made))
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "absent.safetensors"}}))
    with pytest.raises(ArtifactError, match="shard absent.safetensors is missing"):
        resolve_model(str(made))


def test_pickles_and_byte_order_marks(tmp_path: Path) -> None:
    made, state = component(tmp_path / "unet")
    (made / PLAIN).unlink()
    torch.save(state, made / "diffusion_pytorch_model.bin")
    config = (made / "config.json").read_bytes()
    (made / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    source = resolve_model(str(made))
    assert len(source.tensor_entries()) == len(state)
    assert_equal(load_weights(source), state)
    torch.save(dict(list(state.items())[:5]), made / "diffusion_pytorch_model-00001-of-00002.bin")
    torch.save(dict(list(state.items())[5:]), made / "diffusion_pytorch_model-00002-of-00002.bin")
    (made / "diffusion_pytorch_model.bin").unlink()
    shards = {k: f"diffusion_pytorch_model-0000{1 + (i >= 5)}-of-00002.bin" for i, k in enumerate(state)}
    (made / "diffusion_pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert_equal(loaded(made), state)


@pytest.mark.parametrize("prefix", ["model.", "module.", "unet.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_all_names(tmp_path: Path, prefix: str) -> None:
    made, state = component(tmp_path / "unet")
    save_file({prefix + name: tensor for name, tensor in state.items()}, made / PLAIN)
    source = resolve_model(str(made))
    assert source.tensor_entries().keys() == state.keys()
    assert_equal(load_weights(source), state)


@pytest.mark.parametrize("key", ["ema", "ema_state_dict", "state_dict", "unet"])
def test_tables_inside_a_checkpoint(tmp_path: Path, key: str) -> None:
    """Averaged weights go before those that were trained on."""
    made, state = component(tmp_path / "unet")
    (made / PLAIN).unlink()
    stale = {"model": {k: v * 0 for k, v in state.items()}} if key.startswith("ema") else {}
    torch.save({**stale, key: state, "step": 7}, made / "diffusion_pytorch_model.bin")
    assert_equal(loaded(made), state)


@pytest.mark.parametrize(("scale", "extra"), [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
@pytest.mark.parametrize("per_row", [False, True])
def test_scaled_fp8(tmp_path: Path, scale: str, extra: str, per_row: bool) -> None:
    made, state = component(tmp_path / "unet")
    scaled, expected = dict(state), dict(state)
    for name, tensor in state.items():
        if name.endswith("weight") and tensor.dim() > 1:
            owner = name.removesuffix("weight")
            rows = torch.rand(len(tensor)) + 0.5 if per_row else torch.tensor(0.25)
            shaped = rows.view(-1, *[1] * (tensor.dim() - 1)) if per_row else rows
            scaled[name] = (tensor / shaped).to(torch.float8_e4m3fn)
            expected[name] = scaled[name].float() * shaped
            scaled |= {owner + scale: rows, owner + extra: torch.tensor(1.0)}
    scaled["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    save_file(scaled, made / PLAIN)
    source = resolve_model(str(made))
    assert source.tensor_entries().keys() == state.keys()
    found = load_weights(source)
    assert_equal(found, expected)
    build_network(source.class_name, source.config, found, "fp8")


def test_weights_of_another_quantizer_are_refused(tmp_path: Path) -> None:
    made, state = component(tmp_path / "unet")
    save_file({**state, "conv_in.weight.absmax": torch.zeros(4)}, made / PLAIN)
    with pytest.raises(ArtifactError, match="quantized already"):
        resolve_model(str(made)).tensor_entries()


def test_a_modular_index_says_which_model_to_give(tmp_path: Path) -> None:
    entry = {"repo": "someone/xl", "subfolder": "unet", "variant": "fp16"}
    index = {"_class_name": "StableDiffusionXLModularPipeline", "unet": [None, None, entry], "vae": [None, None, {}]}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="modular pipeline") as caught:
        resolve_model(str(tmp_path))
    assert "dqtool dilate someone/xl --variant fp16" in str(caught.value)


def variants_only(pipeline: Path) -> Path:
    """Give every weight file of a pipeline the variant fp16."""
    for path in pipeline.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    return pipeline


def test_a_pipeline_of_variants_alone(tmp_path: Path, run: Any) -> None:
    """Companions go by plain names, so that every library loads the exported pipeline."""
    pipeline = variants_only(text_pipeline("sd", tmp_path / "sd"))
    companions = companions_of_source(resolve_model(str(pipeline)))
    assert companions is not None
    assert {name for name in companions.names if "safetensors" in name} == {
        "text_encoder/model.safetensors",
        f"vae/{PLAIN}",
    }
    assert companions.decoder() is not None
    with companions.text_pipeline() as loaded_pipeline:
        assert loaded_pipeline.text_encoder is not None


def test_companions_follow_the_variant(tmp_path: Path) -> None:
    pipeline = text_pipeline("sd", tmp_path / "sd")
    vae = load_file(pipeline / "vae" / PLAIN)
    save_file({k: v * 2 for k, v in vae.items()}, pipeline / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    unet = load_file(pipeline / "unet" / PLAIN)
    save_file(unet, pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    for variant, scale in ((None, 1), ("fp16", 2)):
        companions = companions_of_source(resolve_model(str(pipeline), hints=ModelHints(variant=variant)))
        assert companions is not None
        assert [name for name in companions.names if name.startswith("vae/diff")] == [f"vae/{PLAIN}"]
        found = dict(companions.load("vae").state_dict())
        name = "decoder.conv_out.weight"
        torch.testing.assert_close(found[name], vae[name] * scale)


def test_sharded_companions_keep_the_shards_of_their_index(tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    pipeline = text_pipeline("sd", tmp_path / "sd")
    vae = AutoencoderKL.from_pretrained(pipeline / "vae")
    (pipeline / "vae" / PLAIN).unlink()
    vae.save_pretrained(pipeline / "vae", max_shard_size="20KB")
    vae.save_pretrained(pipeline / "vae", max_shard_size="20KB", variant="fp16")
    companions = companions_of_source(resolve_model(str(pipeline)))
    assert companions is not None
    assert not [name for name in companions.names if "fp16" in name]
    for path in (pipeline / "vae").glob("*"):
        if "safetensors" in path.name and "fp16" not in path.name:
            path.unlink()
    companions = companions_of_source(resolve_model(str(pipeline)))
    assert companions is not None
    name = "decoder.conv_out.weight"
    torch.testing.assert_close(companions.load("vae").state_dict()[name], vae.state_dict()[name])


def test_the_variant_is_an_option(tmp_path: Path, run: Any) -> None:
    pipeline = tiny_pipeline(tmp_path / "tiny")
    weights = pipeline / "unet" / PLAIN
    save_file(load_file(weights), weights.with_name("diffusion_pytorch_model.ema.safetensors"))
    weights.rename(weights.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    result = run("dilate", "tiny", "--scaling", "none", cwd=tmp_path)
    assert result.returncode == 2
    assert "--variant" in result.stderr
    result = run("dilate", "tiny", "--scaling", "none", "--variant", "ema", cwd=tmp_path)
    assert result.returncode == 0, result.stderr

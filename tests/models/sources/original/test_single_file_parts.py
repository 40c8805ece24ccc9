"""Other components of single files become companions: text encoders, autoencoder; tokenizers are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import component_directory, text_pipeline
from safetensors.torch import load_file, save_file
from single_files import clip_names, open_clip_names, text_tower, tokenizer, unet_config, write

from dqtool.artifacts import read_manifest
from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.models.components.companions import companions_of_source
from dqtool.models.sources.hints import ModelHints
from dqtool.models.sources.resolve import ModelSource, resolve_model

PROMPTS = ["a handwritten seven", "the digit 3"]


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))


def encoded(source: ModelSource, **more: Any) -> tuple[torch.Tensor, ...]:
    companions = companions_of_source(source)
    assert companions is not None
    with companions.text_pipeline() as pipeline, torch.no_grad():
        return pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, **more)


def tokens(path: Path, pad: str | None = None) -> torch.Tensor:
    from transformers import CLIPTokenizer

    loaded = CLIPTokenizer.from_pretrained(path)
    if pad is not None:
        loaded.pad_token = pad
    return loaded(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids


def test_stable_diffusion_1(tmp_path: Path) -> None:
    text = text_tower(tokenizer(tmp_path / "tokenizer"), 64, 2, quick=True)
    _, stage = write(tmp_path / "m.safetensors", 64, {"cond_stage_model.transformer.": clip_names(text)})
    config = unet_config(tmp_path / "c.json", 64)
    source = resolve_model(
        str(tmp_path / "m.safetensors"), config, hints=ModelHints(tokenizer=str(tmp_path / "tokenizer"))
    )
    assert (source.model_index or {})["_class_name"] == "StableDiffusionPipeline"
    states, _ = encoded(source, do_classifier_free_guidance=True)
    with torch.no_grad():
        expected = text(tokens(tmp_path / "tokenizer")).last_hidden_state
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
    companions = companions_of_source(source)
    assert companions is not None
    decode, z = companions.decoder(), torch.randn(2, 4, 8, 8)
    assert decode is not None
    with torch.no_grad():
        torch.testing.assert_close(decode(z), stage(z / 0.18215).clamp(-1, 1), rtol=1e-4, atol=1e-4)


def test_stable_diffusion_2_reads_the_states_before_the_last_block(tmp_path: Path) -> None:
    text = text_tower(tokenizer(tmp_path / "tokenizer"), 64, 3, quick=False)
    write(tmp_path / "m.safetensors", 64, {"cond_stage_model.model.": open_clip_names(text)})
    config = unet_config(tmp_path / "c.json", 64)
    source = resolve_model(
        str(tmp_path / "m.safetensors"), config, hints=ModelHints(tokenizer=str(tmp_path / "tokenizer"))
    )
    states, _ = encoded(source, do_classifier_free_guidance=True)
    tower: Any = getattr(text, "text_model", text)
    with torch.no_grad():
        ids = tokens(tmp_path / "tokenizer", pad="!")
        before = text(ids, output_hidden_states=True).hidden_states[-2]
        expected = tower.final_layer_norm(before)
    torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("refiner", [False, True])
def test_sdxl_has_two_encoders_and_its_refiner_the_second(tmp_path: Path, refiner: bool) -> None:
    vocabulary = tokenizer(tmp_path / "tokenizer")
    first, second = text_tower(vocabulary, 64, 2, True), text_tower(vocabulary, 128, 2, False, projection=128)
    texts = {
        "conditioner.embedders.0.transformer.": clip_names(first),
        "conditioner.embedders.1.model.": open_clip_names(second),
    }
    if refiner:
        texts = {"conditioner.embedders.0.model.": open_clip_names(second)}
    context = 128 if refiner else 192
    write(tmp_path / "m.safetensors", context, texts, vector=176)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    config = unet_config(tmp_path / "c.json", context, **added, projection_class_embeddings_input_dim=176)
    source = resolve_model(
        str(tmp_path / "m.safetensors"), config, hints=ModelHints(tokenizer=str(tmp_path / "tokenizer"))
    )
    index = source.model_index or {}
    assert index["_class_name"] == f"StableDiffusionXL{'Img2Img' if refiner else ''}Pipeline"
    assert (index["text_encoder"] == [None, None]) is refiner
    states, _, pooled, _ = encoded(source)
    with torch.no_grad():
        one = first(tokens(tmp_path / "tokenizer"), output_hidden_states=True).hidden_states[-2]
        found = second(tokens(tmp_path / "tokenizer", pad="!"), output_hidden_states=True)
    two = found.hidden_states[-2]
    torch.testing.assert_close(states, two if refiner else torch.cat([one, two], -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, found.text_embeds, rtol=1e-4, atol=1e-4)
    vae = json.loads((source.pipeline or tmp_path).joinpath("vae", "config.json").read_text())
    assert vae["scaling_factor"] == 0.13025


def test_a_file_becomes_a_whole_pipeline(tmp_path: Path, run: Any) -> None:
    """Calibration encodes prompts, and the export is a pipeline that diffusers loads."""
    text = text_tower(tokenizer(tmp_path / "tokenizer"), 64, 2, quick=True)
    write(tmp_path / "m.safetensors", 64, {"cond_stage_model.transformer.": clip_names(text)})
    config = unet_config(tmp_path / "c.json", 64)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    told = ("--config", config, "--scaling", "none")
    warned = run("dilate", "m.safetensors", *told, "-o", "bare.safetensors", cwd=tmp_path)
    assert warned.returncode == 0, warned.stderr
    assert "--tokenizer DIR" in warned.stderr
    for arguments in (
        ("dilate", "m.safetensors", *told, "--tokenizer", "tokenizer"),
        ("calibrate", "--steps", "2", "--samples", "8", "--prompts", "prompts.txt"),
        ("distill", "--iters", "0", "--refine-iters", "0"),
        ("export",),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    tensors = load_file(tmp_path / "calibrated.safetensors")
    with torch.no_grad():
        expected = text(tokens(tmp_path / "tokenizer")).last_hidden_state
    torch.testing.assert_close(tensors["condition.encoder_hidden_states"][:2], expected, rtol=1e-4, atol=1e-4)
    assert read_manifest(tmp_path / "dilated.safetensors").network.source_told == {"tokenizer": "tokenizer"}
    from diffusers import DiffusionPipeline

    import dqtool  # noqa: F401

    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    image = pipeline("a handwritten seven", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 16, 3)


def test_tokenizers_are_checked_and_taken_from_the_local_cache(tmp_path: Path) -> None:
    vocabulary = tokenizer(tmp_path / "tokenizer")
    text = text_tower(vocabulary, 64, 1, quick=True)
    write(tmp_path / "m.safetensors", 64, {"cond_stage_model.transformer.": clip_names(text)})
    config, given = unet_config(tmp_path / "c.json", 64), str(tmp_path / "m.safetensors")
    bare = resolve_model(given, config)
    assert bare.pipeline is None
    assert "--tokenizer" in (bare.lacks or "")
    with pytest.raises(EnvironmentFault):
        resolve_model(given, config, hints=ModelHints(tokenizer=str(tmp_path / "absent")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no tokenizer"):
        resolve_model(given, config, hints=ModelHints(tokenizer=str(tmp_path / "empty")))
    model = tmp_path / "hf" / "hub" / "models--openai--clip-vit-large-patch14"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123456")
    (model / "snapshots").mkdir()
    (tmp_path / "tokenizer").rename(model / "snapshots" / "0123456")
    found = resolve_model(given, config)
    assert (found.lacks, (found.model_index or {})["_class_name"]) == (None, "StableDiffusionPipeline")


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    vocabulary = tokenizer(tmp_path / "tokenizer")
    text = text_tower(vocabulary - 5, 64, 1, quick=True)
    write(tmp_path / "m.safetensors", 64, {"cond_stage_model.transformer.": clip_names(text)})
    config, told = unet_config(tmp_path / "c.json", 64), ModelHints(tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ArtifactError, match="tokenizer has"):
        resolve_model(str(tmp_path / "m.safetensors"), config, hints=told)


def test_a_pipeline_gives_what_a_bare_network_lacks(tmp_path: Path) -> None:
    base = text_pipeline("sd", tmp_path / "base")
    bare = component_directory("unet2d_condition", tmp_path / "unet")
    source = resolve_model(str(bare), hints=ModelHints(pipeline=str(base)))
    whole = resolve_model(str(base))
    assert (source.pipeline, source.component, source.scheduler) == (base, "unet", whole.scheduler)
    assert source.weights[0].parent == bare
    torch.testing.assert_close(encoded(source, do_classifier_free_guidance=True)[0].shape[-1], 12)
    other = component_directory("unet2d", tmp_path / "other")
    with pytest.raises(ArtifactError, match="no component of class UNet2DModel"):
        resolve_model(str(other), hints=ModelHints(pipeline=str(base)))


def test_a_file_in_a_pipeline_keeps_its_own_parts(tmp_path: Path) -> None:
    """The autoencoder is the file's, the text encoder the pipeline's, the schedule too unless the file names its own."""
    base = text_pipeline("sd", tmp_path / "base")
    _, stage = write(tmp_path / "m.safetensors", 12, {})
    config, told = unet_config(tmp_path / "c.json", 12), ModelHints(pipeline=str(base))
    source = resolve_model(str(tmp_path / "m.safetensors"), config, hints=told)
    assert source.scheduler == resolve_model(str(base)).scheduler
    companions = companions_of_source(source)
    assert companions is not None
    assert companions.has("text_encoder")
    decode, z = companions.decoder(), torch.randn(1, 4, 8, 8)
    assert decode is not None
    with torch.no_grad():
        torch.testing.assert_close(decode(z), stage(z / 0.18215).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    marked = load_file(tmp_path / "m.safetensors") | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    save_file(marked, tmp_path / "v.safetensors")
    found = resolve_model(str(tmp_path / "v.safetensors"), config, hints=told).scheduler or {}
    assert (found["prediction_type"], found["timestep_spacing"]) == ("v_prediction", "trailing")

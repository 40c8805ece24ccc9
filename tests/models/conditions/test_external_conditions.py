"""Conditions of models that come without their encoders, and guidance that a network takes as an input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import NETWORKS, SCHEDULER, clip, component_directory, text_pipeline, tiny_vae
from helpers import refused
from safetensors.torch import save_file

from dqtool.artifacts import open_artifact
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.models.conditions.conditioning import Request
from dqtool.models.conditions.external import ConditionSource
from dqtool.models.families import FAMILIES, family_of
from dqtool.models.networks.loading import build_network, load_weights
from dqtool.models.sampling.sampler import IMAGES, image_seeds, initial_noise
from dqtool.models.sources.resolve import resolve_model
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.evaluation.images import maker_of_artifact, maker_of_source
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.inspect import describe, render
from dqtool.stages.sample import SampleOptions, sample
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline in `model`; its UNet dilated with the rest of it (`whole`) and alone (`bare`)."""
    root = tmp_path_factory.mktemp("conditions")
    model = text_pipeline("sd", root / "model")
    dilate(DilateOptions(str(model), str(root / "whole.safetensors"), scaling="wd"), QUIET)
    shutil.copytree(model / "unet", root / "unet")
    dilate(DilateOptions(str(root / "unet"), str(root / "bare.safetensors"), scaling="wd"), QUIET)
    return root


def points(root: Path, name: str, **options: Any) -> Any:
    """Calibrate `name` and open the result."""
    given = {"steps": 2, "samples": 8, "batch_size": 4, "guidance": 1.5} | options
    output = str(root / "calibrated.safetensors")
    return open_artifact(calibrate(CalibrateOptions(str(root / f"{name}.safetensors"), output, **given), QUIET))


def test_random_conditions_are_refused_with_the_ways_out(root: Path, run: Any) -> None:
    for command in (("calibrate", "bare.safetensors", "--steps", "2", "--samples", "4"), ("eval", "bare.safetensors")):
        told = refused(run, root, 2, *command)
        for way in ("--pipeline", "--conditions", "--random-conditions", "encoder_hidden_states [K, 5, 12]"):
            assert way in told, told


def test_a_dry_run_refuses_missing_conditions(root: Path, run: Any) -> None:
    bare = ("calibrate", "bare.safetensors", "--steps", "2", "--samples", "4", "--dry-run")
    assert "--random-conditions" in refused(run, root, 2, *bare)
    assert "--random-conditions" in refused(run, root, 2, "quantize", "unet", "-o", "q", "--dry-run")
    allowed = (*bare, "--random-conditions"), ("calibrate", "whole.safetensors", *bare[2:])
    for command in (*allowed, ("quantize", "unet", "-o", "q", "--random-conditions", "--dry-run")):
        result = run(*command, cwd=root)
        assert result.returncode == 0, result.stderr


def test_random_conditions_on_request_are_recorded_and_used_again(root: Path) -> None:
    artifact = points(root, "bare", guidance=None, random_conditions=True)
    assert artifact.manifest.sampling.as_read["conditions"] == {"from": "random"}
    assert artifact.manifest.parameters.as_read["conditions"] == {"from": "random"}
    assert any("random conditions" in line for line in render(describe(artifact.given)))
    evaluate(EvalOptions(artifact.given, str(root / "eval.json"), metrics=("cost",), samples=1), QUIET)
    whole = points(root, "whole", random_conditions=True)  # this model has an encoder
    assert "conditions" not in whole.manifest.sampling.as_read


def test_another_pipeline_encodes_the_prompts(root: Path) -> None:
    own = points(root, "whole").tensors()
    prompts = root / "prompts.txt"
    prompts.write_text("a handwritten seven\nthe digit 3\n")
    artifact = points(root, "bare", pipeline=str(root / "model"), prompts=str(prompts))
    found = artifact.tensors()
    assert torch.equal(found["condition.encoder_hidden_states"], own["condition.encoder_hidden_states"])
    record = artifact.manifest.sampling.as_read["conditions"]
    assert (record["from"], record["path"]) == ("pipeline", str(root / "model"))
    source = ConditionSource.of(EvalOptions(), artifact.manifest.sampling)
    assert len(maker_of_artifact(artifact, 2, 0, source=source).conditions.names) == 2
    assert any("conditions from the pipeline" in line for line in render(describe(artifact.given)))
    with pytest.raises(UsageError, match="no text encoder"):
        points(root, "bare", pipeline=str(unconditional(root)))
    with pytest.raises(UsageError, match="has the shape"):
        points(root, "bare", pipeline=str(wider(root)))


def unconditional(root: Path) -> Path:
    """A pipeline directory without any text model."""
    from families import unconditional_pipeline

    return unconditional_pipeline(root / "unconditional")


def wider(root: Path) -> Path:
    """A Stable Diffusion pipeline with another width of its text."""
    import diffusers

    text, tokenizer = clip(root / "wide" / "tokenizer", False, 16, 16)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(root / "model", text_encoder=text, tokenizer=tokenizer)
    pipeline.save_pretrained(root / "wide")
    return root / "wide"


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_precomputed_conditions_give_what_the_encoder_gives(root: Path, suffix: str) -> None:
    own = points(root, "whole").tensors()
    table = own["condition.encoder_hidden_states"]
    name = "encoder_hidden_states"
    file = str(root / f"conditions{suffix}")
    tensors = {name: table[:-1].clone(), f"null.{name}": table[-1:].clone()}
    if suffix == ".npz":
        np.savez(file, **{key: value.numpy() for key, value in tensors.items()})
    else:
        save_file(tensors, file)
    artifact = points(root, "bare", conditions=file)
    found = artifact.tensors()
    assert torch.equal(found[f"condition.{name}"], table)
    assert torch.equal(found["trajectory.subjects"], own["trajectory.subjects"])
    assert artifact.manifest.sampling.conditions.path == file
    directory = root / suffix.removeprefix(".")
    distill(DistillOptions(artifact.given, str(directory) + ".d", method="ptq", bits="8/8"), QUIET)
    exported = export(ExportOptions(str(directory) + ".d", str(directory)), QUIET)
    sample(SampleOptions(exported, 1, str(root / "s.png")), QUIET)
    report = evaluate(EvalOptions(exported, str(root / "e.json"), samples=2, metrics=("similarity",)), QUIET)
    assert open_artifact(report).manifest.metrics.as_read["psnr"]["mean"] > 15
    changed = {key: value + 1 for key, value in tensors.items()}
    if suffix == ".npz":
        np.savez(file, **{key: value.numpy() for key, value in changed.items()})
    else:
        save_file(changed, file)
    with pytest.raises(ArtifactError, match="not the conditions"):
        evaluate(EvalOptions(exported, str(root / "e2.json"), samples=2), QUIET)
    Path(file).unlink()
    with pytest.raises(EnvironmentFault, match="--conditions"):
        evaluate(EvalOptions(exported, str(root / "e2.json"), samples=2), QUIET)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoder_hidden_states": torch.zeros(2, 5, 13)}, "has the shape"),
        ({"encoder_hidden_states": torch.zeros(2, 12)}, "has the shape"),
        ({"text": torch.zeros(2, 5, 12)}, "not the network's: text"),
    ],
)
def test_conditions_that_do_not_fit_are_refused(root: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save_file(tensors, root / "wrong.safetensors")
    with pytest.raises(UsageError, match=message):
        points(root, "bare", conditions=str(root / "wrong.safetensors"))


def test_guidance_needs_a_null_condition(root: Path) -> None:
    save_file({"encoder_hidden_states": torch.zeros(2, 5, 12)}, root / "plain.safetensors")
    with pytest.raises(UsageError, match=r"null\.NAME"):
        points(root, "bare", conditions=str(root / "plain.safetensors"))
    artifact = points(root, "bare", conditions=str(root / "plain.safetensors"), guidance=None)
    assert artifact.manifest.sampling.as_read["guidance"] == 1.0
    with pytest.raises(UsageError, match="Leave one of the two out"):
        points(root, "bare", conditions="a", pipeline="b")


def test_names_that_follow_from_others_may_be_left_out(tmp_path: Path) -> None:
    family, config = FAMILIES["PixArtTransformer2DModel"], NETWORKS["pixart"]
    save_file({"encoder_hidden_states": torch.ones(3, 5, 12)}, tmp_path / "c.safetensors")
    source = ConditionSource(str(tmp_path / "c.safetensors"))
    assert source.conditions(family, config, Request(3), None).table["encoder_attention_mask"].shape == (3, 5)
    family, config = FAMILIES["UNet2DConditionModel"], NETWORKS["sdxl"]
    with pytest.raises(UsageError, match="text_embeds is missing"):
        source.conditions(family, config, Request(3), None)
    tensors = {"encoder_hidden_states": torch.ones(3, 5, 12), "text_embeds": torch.ones(3, 6)}
    save_file(tensors, tmp_path / "c.safetensors")
    table = source.conditions(family, config, Request(3), None).table
    assert table["time_ids"].tolist() == [[64, 64, 0, 0, 64, 64]] * 3


def test_classes_need_no_encoder() -> None:
    family = FAMILIES["UNet2DModel"]
    found = family.make_conditions({**NETWORKS["unet2d"], "num_class_embeds": 5}, Request(8), None)
    assert found.table["class_labels"].tolist() == [0, 1, 2, 3, 4]
    assert not found.guided
    with pytest.raises(UsageError, match="stands for no class"):
        family.make_conditions({**NETWORKS["unet2d"], "num_class_embeds": 5}, Request(8, guidance=2.0), None)


def test_a_refiner_is_asked_with_its_second_encoder(tmp_path: Path) -> None:
    """The first encoder is null, and the numbers beside the text are five."""
    import diffusers

    config = {k: v for k, v in NETWORKS["sdxl"].items() if not k.startswith("_")}
    config |= {"cross_attention_dim": 8, "projection_class_embeddings_input_dim": 8 + 5 * 4}
    text, tokenizer = clip(tmp_path / "tokenizer", True, 8, 8)
    pipeline: Any = diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=tiny_vae(3),
        text_encoder=None,
        text_encoder_2=text,
        tokenizer=None,
        tokenizer_2=tokenizer,
        unet=diffusers.UNet2DConditionModel(**config),
        scheduler=diffusers.EulerDiscreteScheduler(),
        requires_aesthetics_score=True,
    )
    pipeline.save_pretrained(tmp_path / "model")
    source = resolve_model(str(tmp_path / "model"))
    found = maker_of_source(source, 2, 0, 2).conditions
    size = (16, 16)
    with torch.no_grad():
        given, without, pooled, no_pooled = pipeline.encode_prompt(found.names)
    ids, no_ids = pipeline._get_add_time_ids(
        size, (0, 0), size, 6.0, 2.5, size, (0, 0), size, torch.float32, text_encoder_projection_dim=8
    )
    for name, rows in {
        "encoder_hidden_states": [given, without[:1]],
        "text_embeds": [pooled, no_pooled[:1]],
        "time_ids": [ids.expand(2, -1), no_ids],
    }.items():
        torch.testing.assert_close(found.table[name], torch.cat(rows))
    assert family_of(source.class_name, "").example(source.config)["added_cond_kwargs"]["text_embeds"].shape == (1, 8)


def lcm_pipeline(path: Path) -> Path:
    """A stock LatentConsistencyModelPipeline around a tiny network that takes guidance as an input."""
    import diffusers

    config = {k: v for k, v in NETWORKS["unet2d_condition"].items() if not k.startswith("_")}
    width = config["cross_attention_dim"]
    text, tokenizer = clip(path / "tokenizer", False, width, width)
    torch.manual_seed(0)
    diffusers.LatentConsistencyModelPipeline(
        vae=tiny_vae(3),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**config, time_cond_proj_dim=10),
        scheduler=diffusers.LCMScheduler(**{k: v for k, v in SCHEDULER.items() if k != "timestep_spacing"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    (path / "sampling.json").write_text(json.dumps({"prompts": ["a handwritten seven", "the digit 3"]}))
    return path


def test_a_latent_consistency_model_is_sampled_as_its_pipeline_does(tmp_path: Path) -> None:
    """Guidance is embedded, the network is asked once a step, and each step's noise is the image's own."""
    from diffusers import DiffusionPipeline

    source = resolve_model(str(lcm_pipeline(tmp_path / "model")))
    network = build_network(source.class_name, source.config, load_weights(source), "test")
    maker = maker_of_source(source, 2, 5, 4)
    assert not maker.conditions.guided
    assert maker.conditions.embedded == 8.5
    ours = maker.draw(network, 2, 5, 2, "test")
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt=maker.conditions.names,
        latents=initial_noise(maker.shape, range(2), 5, IMAGES),
        generator=[torch.Generator().manual_seed(seed) for seed in image_seeds(range(2), 5, IMAGES)],
        num_inference_steps=4,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs * 2 - 1, rtol=1e-4, atol=1e-5)


def test_embedded_guidance_goes_through_all_stages(tmp_path: Path) -> None:
    at = {name: str(tmp_path / name) for name in "dcqx"}
    dilate(DilateOptions(str(lcm_pipeline(tmp_path / "model")), at["d"]), QUIET)
    calibrate(CalibrateOptions(at["d"], at["c"], steps=2, samples=8, guidance=4.0), QUIET)
    artifact = open_artifact(at["c"])
    sampling = artifact.manifest.sampling.as_read
    assert (sampling["guidance"], sampling["embedded_guidance"]) == (1.0, 4.0)
    assert "embedded guidance 4" in "\n".join(render(describe(at["c"])))
    assert artifact.tensors()["condition.timestep_cond"].shape == (2, 10)
    assert any(record.name == "time_embedding.cond_proj" for record in artifact.manifest.layers)
    distill(DistillOptions(at["c"], at["q"], bits="8/8", iters=1, refine_iters=1), QUIET)
    export(ExportOptions(at["q"], at["x"]), QUIET)
    report = evaluate(EvalOptions(at["x"], str(tmp_path / "e.json"), samples=2, metrics=("similarity",)), QUIET)
    assert open_artifact(report).manifest.metrics.as_read["psnr"]["mean"] > 15
    maker = maker_of_artifact(open_artifact(at["x"]), 2, 0)
    assert torch.equal(maker.conditions.table["timestep_cond"], artifact.tensors()["condition.timestep_cond"])


def test_a_flux_model_is_evaluated_at_the_guidance_it_was_calibrated_with(tmp_path: Path) -> None:
    model = component_directory("flux", tmp_path / "model")
    dilated = dilate(DilateOptions(str(model), str(tmp_path / "d"), scaling="wd"), QUIET)
    for asked, told in ((None, 3.5), (5.0, 5.0)):
        options = CalibrateOptions(
            dilated, str(tmp_path / "c"), steps=2, samples=4, guidance=asked, random_conditions=True
        )
        artifact = open_artifact(calibrate(options, QUIET))
        assert artifact.tensors()["condition.guidance"].unique().tolist() == [told]
        source = ConditionSource.of(EvalOptions(), artifact.manifest.sampling)
        assert maker_of_artifact(artifact, 2, 0, source=source).conditions.table["guidance"].unique().tolist() == [told]

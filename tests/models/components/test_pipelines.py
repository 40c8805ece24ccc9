"""Whole pipelines: real conditions, guidance, companions that travel along, and diffusers' own loop as the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import dit_pipeline, latent_class_pipeline, text_pipeline, unconditional_pipeline

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.errors import UsageError
from dqtool.models.networks.loading import build_network, load_weights
from dqtool.models.sampling.sampler import IMAGES, initial_noise
from dqtool.models.sources.resolve import resolve_model
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.evaluation.images import maker_of_artifact, maker_of_source
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.sample import SampleOptions, sample
from dqtool.stages.shared.settings import RunSettings
from dqtool.training.data import Trajectory

QUIET = RunSettings(quiet=True)
STEPS, SAMPLES = 3, 18
PIPELINES: dict[str, Callable[[Path], Path]] = {
    "dit": dit_pipeline,
    "dit-untied": lambda path: dit_pipeline(path, tied=False),
    "latent-class": latent_class_pipeline,
    "pixel-class": lambda path: latent_class_pipeline(path, pixels=True),
    "sd": lambda path: text_pipeline("sd", path),
}


@pytest.fixture(scope="module", params=PIPELINES)
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five stages of a pipeline, under the default names."""
    directory = tmp_path_factory.mktemp(request.param)
    model = PIPELINES[request.param](directory / "model")
    at = {stage: str(directory / f"{stage}.safetensors") for stage in ("dilated", "calibrated", "distilled")}
    dilate(DilateOptions(str(model), at["dilated"]), QUIET)
    calibrate(CalibrateOptions(at["dilated"], at["calibrated"], steps=STEPS, samples=SAMPLES, batch_size=2), QUIET)
    distill(DistillOptions(at["calibrated"], at["distilled"], bits="8/8", iters=2, refine_iters=2), QUIET)
    export(ExportOptions(at["distilled"], str(directory / "exported")), QUIET)
    return directory


def test_every_point_is_kept_with_and_without_its_condition(chain: Path) -> None:
    artifact = open_artifact(chain / "calibrated.safetensors")
    points = Trajectory.from_tensors(artifact.tensors())
    assert artifact.manifest.sampling.as_read["guidance"] > 1
    assert torch.bincount(points.rows).tolist() == [SAMPLES // STEPS] * STEPS
    pairs, asked = points.x.unflatten(0, (-1, 2)), points.subjects.unflatten(0, (-1, 2))
    assert torch.equal(pairs[:, 0], pairs[:, 1])
    assert (asked[:, 0] == points.null_subject).all()
    assert (asked[:, 1] != points.null_subject).all()
    assert len(asked[:, 1].unique()) > 1


def test_companions_travel_and_the_export_is_a_whole_pipeline(chain: Path) -> None:
    from diffusers import DiffusionPipeline

    files = {p.relative_to(chain / "model") for p in (chain / "model").rglob("*") if p.is_file()}
    network = {f for f in files if f.parts[0] in ("unet", "transformer")}
    untouched = [f for f in files - network if f.parts[0] not in ("scheduler", "model_index.json", "sampling.json")]
    assert untouched
    for file in untouched:
        assert (chain / "exported" / file).read_bytes() == (chain / "model" / file).read_bytes()
    pipeline: Any = DiffusionPipeline.from_pretrained(str(chain / "exported"))
    pipeline.set_progress_bar_config(disable=True)
    index = json.loads((chain / "model" / "model_index.json").read_text())
    assert type(pipeline).__name__ == index["_class_name"]
    given = {"prompt": "the digit 3"} if hasattr(pipeline, "tokenizer") else {"class_labels": [3]}
    images = pipeline(**given, num_inference_steps=STEPS, guidance_scale=2.0, output_type="np").images
    assert images.shape[-3:-1] == (16, 16)
    loaded = dqtool.load(str(chain / "exported"), runtime="simulate")
    assert set(loaded.state_dict()) == set((getattr(pipeline, "unet", None) or pipeline.transformer).state_dict())


def test_eval_reads_the_digit_asked_for(chain: Path) -> None:
    output = evaluate(
        EvalOptions(
            str(chain / "exported"),
            str(chain / "eval.json"),
            metrics=("digits", "similarity", "cost"),
            samples=12,
            grid=str(chain / "grid.png"),
        ),
        QUIET,
    )
    figures = open_artifact(output).manifest.metrics.as_read
    assert figures["psnr"]["mean"] > 15  # 8/8
    assert 0 <= figures["asked_digit_share"] <= 1
    assert "asked_digit_share" in figures["reference"]
    assert figures["missed_timesteps"] == []
    assert figures["cost"]["size_ratio"] > 1.2  # size of the network alone
    assert (chain / "grid.png").stat().st_size > 500
    sample(SampleOptions(str(chain / "exported"), 2, str(chain / "samples.png"), guidance=1.0), QUIET)


def test_a_distilled_artifact_counts_the_network_alone(chain: Path) -> None:
    figures = [
        open_artifact(
            evaluate(
                EvalOptions(str(chain / name), str(chain / f"{name}.eval.json"), metrics=("cost",), samples=1), QUIET
            )
        ).manifest.metrics.as_read["cost"]
        for name in ("distilled.safetensors", "exported")
    ]
    assert figures[0]["bytes"] == pytest.approx(figures[1]["bytes"], rel=0.05)
    assert figures[0]["bops"] == figures[1]["bops"]


def test_repeated_embedders_are_stored_once(chain: Path) -> None:
    repeated = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.weight"
    expected = "untied" in chain.name
    if chain.name.startswith("dit"):
        artifact = open_artifact(chain / "dilated.safetensors")
        assert (repeated in artifact.tensor_names()) == expected
        assert (repeated.removesuffix(".weight") in {r.name for r in artifact.manifest.layers}) == expected
        output = export(
            ExportOptions(str(chain / "distilled.safetensors"), str(chain / "dense"), format="dense"), QUIET
        )
        from diffusers import DiTTransformer2DModel

        dense = DiTTransformer2DModel.from_pretrained(output, subfolder="transformer")
        ours = dqtool.load(output, runtime="simulate")
        x, t, y = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.tensor([3])
        with torch.no_grad():
            assert torch.equal(dense(x, t, y).sample, ours(x, t, y).sample)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart", "sd3", "flux"])
def test_our_loop_gives_the_images_of_diffusers(tmp_path: Path, kind: str) -> None:
    """Text encoding, guidance, schedule and decoding are those of the stock pipeline."""
    from diffusers import DiffusionPipeline

    source = resolve_model(str(text_pipeline(kind, tmp_path / "model")))
    network = build_network(source.class_name, source.config, load_weights(source), "test")
    maker = maker_of_source(source, 2, 5, STEPS)
    ours = maker.draw(network, 2, 5, 2, "test")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3" else {}
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "model", **absent)
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise(maker.shape, range(2), 5, IMAGES)
    theirs = pipeline(
        prompt=maker.conditions.names,
        latents=pipeline._pack_latents(noise, *noise.shape) if kind == "flux" else noise,
        num_inference_steps=STEPS,
        guidance_scale=3.5 if kind == "flux" else maker.conditions.guidance,
        output_type="pt",
        height=16,
        width=16,
        **({"use_resolution_binning": False, "clean_caption": False} if kind == "pixart" else {}),
    ).images
    torch.testing.assert_close(ours, theirs * 2 - 1, rtol=1e-4, atol=1e-5)


def test_unconditional_latents_are_decoded(tmp_path: Path) -> None:
    from diffusers import LDMPipeline

    source = resolve_model(str(unconditional_pipeline(tmp_path / "model")))
    network = build_network(source.class_name, source.config, load_weights(source), "test")
    maker = maker_of_source(source, 2, 5, STEPS)
    ours = maker.draw(network, 2, 5, 2, "test")
    assert ours.shape == (2, 1, 16, 16)
    pipeline = LDMPipeline.from_pretrained(tmp_path / "model")
    latents = maker.sampler.run(pipeline.unet, initial_noise((3, 8, 8), range(2), 5, IMAGES), {})
    with torch.no_grad():
        theirs = pipeline.vqvae.decode(latents / pipeline.vqvae.config.scaling_factor).sample
    torch.testing.assert_close(ours, theirs.clamp(-1, 1))


def test_partial_schedules_index_right(tmp_path: Path) -> None:
    """img2img starts late: every call still finds the entry of its own timestep."""
    from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

    from dqtool.core.bits import LayerBits
    from dqtool.core.quantization import QuantizationSpec
    from dqtool.models.families import FAMILIES
    from dqtool.models.sampling.sampler import Sampler
    from dqtool.nn.assignment import assign_bits
    from dqtool.nn.surgery import insert_fake, steps_of

    source = resolve_model(str(text_pipeline("sd", tmp_path / "model")))
    base = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    family = FAMILIES["UNet2DConditionModel"]
    traced = family.graph(base.unet, source.config).trace
    timesteps = Sampler(family, base.scheduler, 8).timesteps()
    insert_fake(base.unet, assign_bits(traced.layers, QuantizationSpec(LayerBits(16, 16))), timesteps, {})
    pipeline = StableDiffusionImg2ImgPipeline(**base.components, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    used: list[float] = []
    base.unet.register_forward_hook(lambda m, _a, _y: used.append(float(steps_of(m).timesteps[steps_of(m).rows])))
    pipeline("the digit 3", image=torch.zeros(1, 1, 16, 16), strength=0.5, num_inference_steps=8, output_type="latent")
    assert used == timesteps[4:].tolist()
    assert not steps_of(base.unet).missed


def test_prompts_of_the_user_and_of_nobody(tmp_path: Path) -> None:
    model = text_pipeline("sd", tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a handwritten two\n\nthe number 5\n")
    dilated = dilate(DilateOptions(str(model), str(tmp_path / "d.safetensors")), QUIET)
    at = str(tmp_path / "c.safetensors")
    options = {"steps": 2, "samples": 8, "guidance": 4.0}
    calibrate(CalibrateOptions(dilated, at, prompts=str(tmp_path / "prompts.txt"), **options), QUIET)
    artifact = open_artifact(at)
    assert artifact.tensors()["condition.encoder_hidden_states"].shape == (3, 16, 12)
    assert artifact.manifest.sampling.as_read["guidance"] == 4.0
    before = artifact.sha256
    calibrate(CalibrateOptions(dilated, at, **options), QUIET)  # the card's prompts
    assert open_artifact(at).sha256 != before
    calibrate(CalibrateOptions(dilated, at, **{**options, "guidance": 1.0}), QUIET)
    artifact = open_artifact(at)
    assert artifact.manifest.sampling.as_read["guidance"] == 1.0
    assert not maker_of_artifact(artifact, 2, 0).conditions.guided  # nor is it evaluated with the card's
    assert artifact.tensors()["condition.encoder_hidden_states"].shape == (2, 16, 12)


def test_what_a_model_does_not_know_is_refused(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a dog\n")
    model = dit_pipeline(tmp_path / "model")
    dilated = dilate(DilateOptions(str(model), str(tmp_path / "d.safetensors")), QUIET)
    options = CalibrateOptions(dilated, str(tmp_path / "c.safetensors"), steps=2, samples=4)
    with pytest.raises(UsageError, match="classes, not on text"):
        calibrate(replace(options, prompts=str(tmp_path / "prompts.txt")), QUIET)

"""Inpainting and editing UNets: what stands behind the noisy latents is a condition of the sampler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import NETWORKS
from safetensors.torch import load_file, save_file

from dqtool.models.conditions.conditioning import IMAGE_CONDITION, Request
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.sampler import Sampler, initial_noise, make_sampler

FAMILY = FAMILIES["UNet2DConditionModel"]


def config_of(channels: int) -> dict[str, Any]:
    return {**NETWORKS["unet2d_condition"], "in_channels": channels}


def network_of(channels: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return FAMILY.build({k: v for k, v in config_of(channels).items() if k != "_class_name"}).eval()


@pytest.mark.parametrize(("channels", "guidance"), [(9, 1.0), (9, 4.0), (8, 4.0)])
def test_the_sampler_is_diffusers_own_loop(channels: int, guidance: float) -> None:
    """The inpainting pipeline scales and steps the latents and concatenates mask and masked image, for both halves."""
    config, network = config_of(channels), network_of(channels)
    given = FAMILY.conditions(config, 2, torch.Generator().manual_seed(1))
    null = {name: value[:1] + 1 for name, value in given.items()} if guidance > 1 else None
    noise = initial_noise(FAMILY.sample_shape(config), range(2), 0)
    scheduler = make_sampler({"_class_name": "EulerDiscreteScheduler"})
    found = Sampler(FAMILY, scheduler, 3, guidance=guidance).run(network, noise, given, null=null)
    scheduler.set_timesteps(3)
    x = noise[:, :4] * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            x_in = torch.cat([scheduler.scale_model_input(x, t), given[IMAGE_CONDITION]], 1)
            prediction = network(x_in, t, given["encoder_hidden_states"]).sample
            if null is not None:
                without = network(x_in, t, null["encoder_hidden_states"].expand(2, -1, -1)).sample
                prediction = without + guidance * (prediction - without)
            x = scheduler.step(prediction, t, x).prev_sample
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-3)  # halves in one batch or in two
    assert found.shape == (2, 4, 8, 8)
    assert FAMILY.prediction_row(config) == (4, 1, 1)


def test_an_inpainting_network_goes_through_all_stages(tmp_path: Path, run: Any) -> None:
    network_of(9).save_pretrained(tmp_path / "unet")
    config = json.loads((tmp_path / "unet" / "config.json").read_text())
    (tmp_path / "unet" / "config.json").write_text(json.dumps({**config, "_context_tokens": 5}))
    generator = torch.Generator().manual_seed(3)
    drawn = FAMILY.conditions(config_of(9), 3, generator)
    null = torch.randn(1, 5, 12, generator=generator)
    save_file({**drawn, "null.encoder_hidden_states": null}, tmp_path / "conditions.safetensors")
    refused = run("dilate", "unet", "--scaling", "none", cwd=tmp_path)
    assert refused.returncode == 0, refused.stderr
    refused = run("calibrate", "--steps", "2", "--samples", "8", cwd=tmp_path)
    assert refused.returncode == 2
    assert IMAGE_CONDITION in refused.stderr
    told = ("--conditions", "conditions.safetensors", "--guidance", "3")
    for arguments in (
        ("calibrate", "--steps", "2", "--samples", "8", *told),
        ("distill", "--iters", "2", "--refine-iters", "2"),
        ("export",),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    tensors = load_file(tmp_path / "calibrated.safetensors")
    points, subjects = tensors["trajectory.x"], tensors["trajectory.subjects"]
    table = tensors[f"condition.{IMAGE_CONDITION}"]
    assert points.shape[1:] == (9, 8, 8)
    assert all(any(torch.equal(row, one) for one in drawn[IMAGE_CONDITION]) for row in table[:-1])
    for index in range(0, len(points), 2):  # a point without the condition, then with it: the same image beside both
        torch.testing.assert_close(points[index, 4:], table[subjects[index + 1]])
        torch.testing.assert_close(points[index], points[index + 1])
        assert int(subjects[index]) == len(table) - 1


def folder_of_images(path: Path, count: int = 3) -> Path:
    """Pictures of noise, larger than the models' images."""
    from PIL import Image

    path.mkdir()
    for i in range(count):
        pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path / f"{i}.png")
    return path


def image_pipeline(channels: int, path: Path) -> Path:
    """The stock pipeline of inpainting (9 channels) or editing (8) around tiny networks."""
    import diffusers
    from families import SCHEDULER, clip, tiny_vae

    text, tokenizer = clip(path / "tokenizer", False, 12, 12)
    kind = (
        diffusers.StableDiffusionInpaintPipeline if channels == 9 else diffusers.StableDiffusionInstructPix2PixPipeline
    )
    kind(
        vae=tiny_vae(3),
        text_encoder=text,
        tokenizer=tokenizer,
        unet=network_of(channels),
        scheduler=diffusers.EulerDiscreteScheduler(**{k: v for k, v in SCHEDULER.items() if k != "clip_sample"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    (path / "sampling.json").write_text(json.dumps({"prompts": ["a handwritten seven", "the digit 3"]}))
    return path


@pytest.mark.parametrize("channels", [9, 8])
def test_images_of_a_folder_are_the_conditions_of_all_stages(tmp_path: Path, run: Any, channels: int) -> None:
    image_pipeline(channels, tmp_path / "model")
    folder_of_images(tmp_path / "pictures")
    steps = ("--steps", "2", "--samples", "24")
    for arguments in (
        ("dilate", "model"),
        ("calibrate", *steps, "--images", "pictures"),
        ("distill", "--bits", "8/8", "--iters", "1", "--refine-iters", "1"),
        ("export",),
        ("eval", "--samples", "3", "--metrics", "similarity"),
    ):
        result = run(*arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    tensors = load_file(tmp_path / "calibrated.safetensors")
    copies = 2 if channels == 9 else 3
    x, subjects = tensors["trajectory.x"], tensors["trajectory.subjects"]
    beside, null = tensors[f"condition.{IMAGE_CONDITION}"], len(tensors[f"condition.{IMAGE_CONDITION}"]) - 1
    assert null == 3  # one row for each image, though there are two prompts
    for first in range(0, len(x), copies):
        own = beside[subjects[first + copies - 1]]
        torch.testing.assert_close(x[first + copies - 1, 4:], own)
        torch.testing.assert_close(x[first + copies - 2, 4:], own)
        assert subjects[first : first + copies - 1].tolist() == [null] * (copies - 1)
        if copies == 3:
            assert not bool(x[first, 4:].any())
            torch.testing.assert_close(x[first, :4], x[first + 2, :4])
    manifest = json.loads((tmp_path / "calibrated.json").read_text())["pipeline"]["sampling"]
    assert manifest.get("image_guidance") == (None if channels == 9 else 1.5)
    assert manifest["conditions"]["from"] == "images"
    assert json.loads((tmp_path / "eval.json").read_text())["metrics"]["psnr"]["mean"] > 15
    (tmp_path / "pictures" / "0.png").unlink()
    changed = run("eval", "--samples", "3", "--seed", "1", cwd=tmp_path)
    assert changed.returncode == 3 and "--images" in changed.stderr


def test_editing_is_sampled_as_its_pipeline_does(tmp_path: Path) -> None:
    """Two weights of guidance and three inputs a step, on an image that the pipeline encodes itself."""
    import diffusers

    from dqtool.models.components.companions import companions_of_source
    from dqtool.models.sources.resolve import resolve_model
    from dqtool.stages.shared.folder_images import encoded_images

    source = resolve_model(str(image_pipeline(8, tmp_path / "model")))
    companions = companions_of_source(source)
    images = encoded_images(str(folder_of_images(tmp_path / "pictures", 2)), (4, 8, 8), companions)
    request = Request(2, guidance=3.0, images=images, card={"prompts": ["a handwritten seven", "the digit 3"]})
    found = FAMILY.make_conditions({**source.config, "_context_tokens": 16}, request, companions)
    pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    noise = initial_noise((8, 8, 8), range(2), 0)
    theirs = pipeline(
        prompt=found.names,
        image=images.images / 2 + 0.5,
        latents=noise[:, :4].clone(),
        num_inference_steps=3,
        guidance_scale=3.0,
        image_guidance_scale=1.5,
        output_type="latent",
    ).images
    sampler = Sampler(FAMILY, make_sampler(source.scheduler), 3, guidance=3.0, image_guidance=1.5)
    ours = sampler.run(network_of(8), noise, found.given(0, 2), null=found.null)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_masks_hide_what_the_network_paints(tmp_path: Path) -> None:
    from dqtool.models.conditions.images import EncodedImages, beside_latents, random_masks

    images = torch.rand(4, 3, 16, 16) + 0.5

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels, 2)[:, [0, 1, 2, 0]]

    given = beside_latents(EncodedImages(images, encode, lambda z: 2 * z), 5, 9, seed=3)
    masks = random_masks(4, 16, 3)
    assert given.shape == (4, 5, 8, 8)
    assert set(given[:, 0].unique().tolist()) == {0.0, 1.0}
    assert 0.05 < float(masks.mean()) < 0.6
    torch.testing.assert_close(given[:, 1:], 2 * encode(images * (1 - masks)))
    assert torch.equal(masks, random_masks(4, 16, 3)) and not torch.equal(masks, random_masks(4, 16, 4))
    plain = beside_latents(EncodedImages(images, encode, lambda z: 2 * z), 4, 2, seed=3)
    assert torch.equal(plain, encode(images[:2]))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_run_from_an_image_is_that_of_img2img(tmp_path: Path, name: str) -> None:
    import diffusers
    from families import text_pipeline

    pipe: Any = diffusers.StableDiffusionImg2ImgPipeline(
        **diffusers.DiffusionPipeline.from_pretrained(text_pipeline("sd", tmp_path / "sd")).components,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipe("the digit 3", image=start, strength=0.6, num_inference_steps=5, guidance_scale=2.0,
                  generator=torch.Generator().manual_seed(2), output_type="latent").images  # fmt: skip
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    given, null = (each.detach() for each in pipe.encode_prompt("the digit 3", "cpu", 1, True))
    sampler = Sampler(FAMILY, make_sampler({**pipe.scheduler.config, "_class_name": name}), 5, guidance=2.0)
    conditions, without = ({"encoder_hidden_states": each} for each in (given, null))
    start = start * pipe.vae.config.scaling_factor if name == "none" else start
    ours = sampler.run(pipe.unet, noise, conditions, null=without, start=start, skipped=2)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_calibration_from_images_keeps_every_step(tmp_path: Path, run: Any) -> None:
    """Half as many trajectories more begin at the pictures, so that late steps see them too."""
    from helpers import tiny_pipeline

    tiny_pipeline(tmp_path / "tiny")
    folder_of_images(tmp_path / "pictures")
    assert run("dilate", "tiny", cwd=tmp_path).returncode == 0
    for name, extra in (("plain", ()), ("images", ("--images", "pictures"))):
        result = run("calibrate", "--steps", "4", "--samples", "32", "-o", f"{name}.safetensors", *extra, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    plain, images = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "images"))
    assert torch.equal(plain["trajectory.rows"], images["trajectory.rows"])
    assert torch.equal(plain["timesteps"], images["timesteps"])
    known = {x.numpy().tobytes() for x in plain["trajectory.x"]}
    new = [row for x, row in zip(images["trajectory.x"], images["trajectory.rows"].tolist(), strict=True)
           if x.numpy().tobytes() not in known]  # fmt: skip
    assert new and 0 not in new
    assert set(new) == {1, 2, 3}
    missing = run("calibrate", "--images", "nowhere", "--force", cwd=tmp_path)
    assert missing.returncode == 4 and "nowhere" in missing.stderr


def test_prompts_do_not_make_images(tmp_path: Path) -> None:
    from families import text_pipeline

    from dqtool.errors import UsageError
    from dqtool.models.components.companions import companions_of_source
    from dqtool.models.sources.resolve import resolve_model

    companions = companions_of_source(resolve_model(str(text_pipeline("sd", tmp_path / "sd"))))
    with pytest.raises(UsageError, match="image conditions"):
        FAMILY.make_conditions(config_of(9), Request(2), companions)
    found = FAMILY.make_conditions(config_of(9), Request(2, random=True), companions)
    assert found.random
    assert found.table[IMAGE_CONDITION].shape == (len(found), 5, 8, 8)

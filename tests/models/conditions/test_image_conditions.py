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

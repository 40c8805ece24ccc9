"""ControlNets and adapters beside a quantized UNet, through diffusers' pipelines, in every runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dqtool
from dqtool.errors import ArtifactError
from dqtool.models.families import family_of

CHANNELS = (16, 32)
"""Channels of the network that reads the control image: two for images of twice the latents' size."""


@pytest.fixture(scope="module")
def whole(stable_diffusion: Path) -> Any:
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(str(stable_diffusion / "tiny-sd"))


@pytest.fixture(scope="module")
def control(whole: Any) -> Any:
    """A ControlNet of the float UNet whose last convolutions are not zero."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    network = ControlNetModel.from_unet(whole.unet, conditioning_embedding_out_channels=CHANNELS)
    for name, weight in network.named_parameters():
        if name.startswith("controlnet_") and "cond_embedding" not in name:
            torch.nn.init.normal_(weight, std=0.3)
    return network.eval()


def quantized(stable_diffusion: Path, runtime: str) -> Any:
    if runtime == "openvino":
        pytest.importorskip("openvino")
    return dqtool.load(str(stable_diffusion / "exported"), runtime)


def picture(whole: Any, unet: Any, control: Any, scale: float) -> np.ndarray:
    """Latents of a call with a control image at this strength."""
    from diffusers import StableDiffusionControlNetPipeline

    pipe = StableDiffusionControlNetPipeline(
        **{**whole.components, "unet": unet}, controlnet=control, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 8, 8, generator=generator)
    found = pipe(
        "a b",
        image=image,
        num_inference_steps=4,
        guidance_scale=2.0,
        controlnet_conditioning_scale=scale,
        generator=generator,
        output_type="latent",
    )
    return found.images.numpy()


@pytest.mark.parametrize("runtime", ["cpu", "simulate", "openvino"])
def test_residuals_of_a_controlnet(stable_diffusion: Path, whole: Any, control: Any, runtime: str) -> None:
    unet = quantized(stable_diffusion, runtime)
    plain, wanted = (picture(whole, whole.unet, control, scale) for scale in (0.0, 1.0))
    before, found = (picture(whole, unet, control, scale) for scale in (0.0, 1.0))
    size = np.linalg.norm(wanted - plain)
    assert size > 0.1 * np.linalg.norm(plain)
    assert np.linalg.norm((found - before) - (wanted - plain)) < 0.3 * size


@pytest.mark.parametrize("runtime", ["cpu", "simulate"])
def test_a_controlnet_starts_from_the_dequantized_weights(stable_diffusion: Path, whole: Any, runtime: str) -> None:
    from diffusers import ControlNetModel

    unet = quantized(stable_diffusion, runtime)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=CHANNELS)
    wanted = quantized(stable_diffusion, "simulate").conv_in.quantized_weight()
    torch.testing.assert_close(network.conv_in.weight, wanted)
    state = network.state_dict()
    exact = whole.unet.state_dict()
    for name in ("down_blocks.1.attentions.0.proj_in.weight", "mid_block.resnets.0.conv1.weight"):
        assert 0 < float((state[name] - exact[name]).norm() / exact[name].norm()) < 0.05
    assert type(unet.conv_in).__name__ != "Conv2d"


@pytest.mark.parametrize("name", ["ControlNetModel", "generic:ControlNetModel", "T2IAdapter", "AutoencoderKL"])
def test_networks_beside_the_denoiser_are_not_quantized(name: str) -> None:
    with pytest.raises(ArtifactError, match="works beside a quantized one"):
        family_of(name, "config.json")

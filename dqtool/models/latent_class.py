"""Latent diffusion pipeline conditioned on class labels through cross-attention, such as CompVis' LDM-4 for ImageNet.

diffusers has the network (`UNet2DConditionModel`) and the decoders, but no pipeline that combines them with a class
embedder. `LatentClassPipeline` does, with the interface of `DiTPipeline`. Without a decoder it works on pixels.
"""

# mypy: disable-error-code="attr-defined"
# diffusers' lazy imports hide the attributes of its pipelines.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor, nn

__all__ = ["ClassEmbedder", "LatentClassPipeline"]


class ClassEmbedder(ModelMixin, ConfigMixin):
    """Embedding of class labels `[N]` as a context of one token `[N, 1, dim]`. The last row (`classes`) means "no class"."""

    @register_to_config
    def __init__(self, classes: int = 1000, dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(classes + 1, dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Return the context `[N, 1, dim]` in the embedding's dtype."""
        result: Tensor = self.embedding(labels)[:, None]
        return result


class LatentClassPipeline(DiffusionPipeline):
    """Class-conditional latent diffusion with classifier-free guidance.

    `vae` is an `AutoencoderKL` or a `VQModel`; latents are scaled by its `scaling_factor`. It is None for a network whose
    samples are images in [-1, 1].
    """

    _optional_components: ClassVar[list[str]] = ["vae"]
    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(self, unet: Any, vae: Any, class_embedder: ClassEmbedder, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, class_embedder=class_embedder, scheduler=scheduler)
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 3.0,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image per label; a `guidance_scale` of 1 or less disables guidance."""
        labels = torch.as_tensor(class_labels, device=self._execution_device).reshape(-1)
        guided = guidance_scale > 1
        if guided:
            labels = torch.cat([torch.full_like(labels, self.class_embedder.config.classes), labels])
        context = self.class_embedder(labels).to(self.unet.dtype)
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        shape = (len(class_labels), self.unet.config.in_channels, height, width)
        latents = _noise(shape, generator).to(self._execution_device, self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = latents * self.scheduler.init_noise_sigma
        extra = self._step_arguments(eta, generator)
        for timestep in self.progress_bar(self.scheduler.timesteps):
            inputs = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, timestep)
            predicted = self.unet(inputs, timestep, encoder_hidden_states=context, return_dict=False)[0]
            if guided:
                without, given = predicted.chunk(2)
                predicted = without + guidance_scale * (given - without)
            latents = self.scheduler.step(predicted, timestep, latents, **extra, return_dict=False)[0]
        images = latents
        if self.vae is not None:
            images = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        images = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _step_arguments(self, eta: float, generator: Any) -> dict[str, Any]:
        import inspect

        known = inspect.signature(self.scheduler.step).parameters
        return {key: value for key, value in (("eta", eta), ("generator", generator)) if key in known}


def _noise(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    if isinstance(generator, list):
        return torch.cat([torch.randn((1, *shape[1:]), generator=each) for each in generator])
    return torch.randn(shape, generator=generator)

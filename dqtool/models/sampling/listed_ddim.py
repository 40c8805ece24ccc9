"""DDIM scheduler for an arbitrary list of timesteps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

__all__ = ["ListedDDIMScheduler"]

_Base: Any = DDIMScheduler


class ListedDDIMScheduler(_Base):
    """DDIM (arXiv 2010.02502, Eq. 12 and 16) over a list of timesteps: each step goes to the next timestep of the list.

    The last step gives the clean image. diffusers' DDIM always steps back by T / steps, whatever its timesteps.
    """

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, timesteps: Sequence[int] | None = None
    ) -> None:
        """Set `timesteps`, in descending order.

        Raises:
            ValueError: the timesteps don't descend, or lie outside of the training schedule.
        """
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)
            return
        values = torch.as_tensor(timesteps)
        if bool((values.diff() >= 0).any()):
            raise ValueError("they must fall from step to step")
        if values.is_floating_point() or not 0 <= int(values[-1]) <= int(values[0]) < self.config.num_train_timesteps:
            raise ValueError(f"they must be whole numbers from 0 to {self.config.num_train_timesteps - 1}")
        self.timesteps, self.num_inference_steps = values.to(device), len(values)

    def before(self, timestep: int) -> int:
        """Return the next timestep of the list; -1 after the last."""
        later = [int(t) for t in self.timesteps if int(t) < int(timestep)]
        return max(later, default=-1)

    def step(
        self,
        model_output: Tensor,
        timestep: int,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Return the sample at the next timestep of the list."""
        now, before = int(timestep), self.before(int(timestep))
        alpha = self.alphas_cumprod[now]
        alpha_before = self.alphas_cumprod[before] if before >= 0 else self.final_alpha_cumprod
        signal, noise = alpha**0.5, (1 - alpha) ** 0.5
        kind = self.config.prediction_type
        if kind == "epsilon":
            image, epsilon = (sample - noise * model_output) / signal, model_output
        elif kind == "sample":
            image, epsilon = model_output, (sample - signal * model_output) / noise
        else:
            image, epsilon = signal * sample - noise * model_output, signal * model_output + noise * sample
        if self.config.thresholding:
            image = self._threshold_sample(image)
        elif self.config.clip_sample:
            image = image.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        if use_clipped_model_output:
            epsilon = (sample - signal * image) / noise
        deviation = eta * self._get_variance(now, before) ** 0.5
        result = alpha_before**0.5 * image + (1 - alpha_before - deviation**2).clamp(min=0) ** 0.5 * epsilon
        if eta > 0:
            drawn = variance_noise
            if drawn is None:
                drawn = randn_tensor(
                    model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
                )
            result = result + deviation * drawn
        return DDIMSchedulerOutput(prev_sample=result, pred_original_sample=image) if return_dict else (result, image)

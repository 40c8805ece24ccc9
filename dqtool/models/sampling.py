"""Running the reverse process: the sampler objects of diffusers drive it, one loop serves every network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.errors import ArtifactError, UsageError
from dqtool.models.families import Family

__all__ = [
    "CALIBRATION",
    "IMAGES",
    "SAMPLERS",
    "Sampler",
    "image_seeds",
    "initial_noise",
    "make_sampler",
]

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
}
"""Names on the command line, and the diffusers scheduler each stands for."""

BARE_COMPONENT = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
"""The schedule of a network that comes without a pipeline: DDIM over 1000 linear betas."""

CALIBRATION, IMAGES = 0, 500_000_000
"""Where each use's noise begins: the images that are judged never share noise with those a model was trained on."""

Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Called with (model input, timestep, prediction) at every step."""


def make_sampler(config: Mapping[str, Any] | None, name: str | None = None) -> Any:
    """A diffusers scheduler: the pipeline's own (`config`, its class in `_class_name`) or the one called `name` with
    the pipeline's noise schedule.

    Raises:
        UsageError: an unknown name.
        ArtifactError: the pipeline's own scheduler is of a class that diffusers lacks.
    """
    import diffusers

    config = dict(config or BARE_COMPONENT)
    own = config.get("_class_name", BARE_COMPONENT["_class_name"])
    if name is not None and name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'.", where="--sampler", fix=f"Choose from {', '.join(SAMPLERS)}")
    class_name = own if name is None else SAMPLERS[name]
    if class_name != own:
        config = {k: v for k, v in config.items() if k not in ("_class_name", "_use_default_values")}
        if name == "plms":
            config["skip_prk_steps"] = True
    if not hasattr(diffusers, class_name):
        raise ArtifactError(
            f"diffusers has no scheduler '{class_name}'",
            where="scheduler config, key _class_name",
            fix="Upgrade diffusers",
        )
    return getattr(diffusers, class_name).from_config(config)


@dataclass
class Sampler:
    """A family's reverse process with a fixed scheduler, number of steps and eta."""

    family: Family
    scheduler: Any
    steps: int
    eta: float = 0.0

    def timesteps(self) -> Tensor:
        """The table `[T]` of distinct timesteps the network will be given, in sampling order. PLMS asks for its second
        timestep twice, so `T` may be less than the number of calls."""
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(self.steps)
        seen: dict[float, None] = dict.fromkeys(scheduler.timesteps.double().tolist())
        return torch.tensor(list(seen), dtype=torch.float32)

    @torch.no_grad()
    def run(
        self,
        model: nn.Module,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        seeds: list[int] | None = None,
        observer: Observer | None = None,
    ) -> Tensor:
        """Denoise `noise` `[N, C, H, W]` (unit variance) to samples of the same shape.

        `seeds` gives each sample its own noise source, for stochastic samplers: a sample does not depend on the batch
        it is in. `observer` sees every call of the network.
        """
        scheduler = copy.deepcopy(self.scheduler)  # multistep samplers keep a history
        scheduler.set_timesteps(self.steps)
        generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        extra = _step_arguments(scheduler, self.eta, generators)
        x = noise * scheduler.init_noise_sigma
        for timestep in scheduler.timesteps:
            x_in = scheduler.scale_model_input(x, timestep)
            prediction = self.family.predict(model, x_in, timestep, conditions)
            if observer is not None:
                observer(x_in, timestep, prediction)
            x = scheduler.step(prediction, timestep, x, **extra).prev_sample
        return x

    def batches(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        samples: int,
        seed: int,
        batch_size: int,
        conditions: Callable[[int, int], Mapping[str, Tensor]] | None = None,
        observer: Observer | None = None,
        use: int = IMAGES,
    ) -> Iterator[Tensor]:
        """Samples `[n, *shape]`, batch by batch, `samples` in all; image i depends on `seed`, i and `use` alone."""
        for start in range(0, samples, batch_size):
            stop = min(start + batch_size, samples)
            noise = initial_noise(shape, range(start, stop), seed, use)
            given = {} if conditions is None else conditions(start, stop)
            yield self.run(model, noise, given, image_seeds(range(start, stop), seed, use), observer)


def initial_noise(shape: tuple[int, ...], indices: range, seed: int, use: int = IMAGES) -> Tensor:
    """Starting noise of the images with these indices, `[len(indices), *shape]`: a function of its arguments alone."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(image_seed + 1))
            for image_seed in image_seeds(indices, seed, use)
        ]
    )


def image_seeds(indices: range, seed: int, use: int = IMAGES) -> list[int]:
    """One seed an image, for a stochastic sampler's own noise; its successor is that of the starting noise."""
    return [(seed * 1_000_003 + use + index) % (1 << 62) * 2 for index in indices]


def _step_arguments(scheduler: Any, eta: float, generators: list[torch.Generator] | None) -> dict[str, Any]:
    import inspect

    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "eta" in accepted:
        extra["eta"] = eta
    if "generator" in accepted and generators is not None:
        extra["generator"] = generators
    return extra

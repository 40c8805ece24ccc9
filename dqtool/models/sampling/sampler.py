"""The sampling loop: one loop for every network, driven by diffusers' schedulers."""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from dqtool.artifacts.checkpoints import CallCheckpoints
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.records import SamplingRecord
from dqtool.core.device import to_device_of
from dqtool.distributed import by_rows, world_size
from dqtool.errors import UsageError
from dqtool.models.conditions.conditioning import IMAGE_CONDITION
from dqtool.models.config_schema import built
from dqtool.models.families import Family
from dqtool.models.sampling.network_time import NetworkTime
from dqtool.models.sampling.noise_correction import NoiseCorrection, noise_scale, response
from dqtool.models.sampling.schedulers import (
    CONFIG,
    SAMPLERS,
    SchedulerChoices,
    make_sampler,
    scheduler_class,
    set_listed,
)
from dqtool.models.sampling.teacher_precision import computed
from dqtool.nn.steps import step_run

__all__ = [
    "CALIBRATION",
    "IMAGES",
    "SAMPLERS",
    "Sampler",
    "image_seeds",
    "initial_noise",
    "make_sampler",
    "scheduler_class",
]

CALIBRATION, IMAGES = "calibration", "images"
"""Uses of noise. `image_seeds` separates them, so that evaluated images never share noise with calibration samples."""


Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Function that is called with (model input, timestep, prediction) at every step."""


@dataclass
class Sampler:
    """Reverse process of a family with a fixed scheduler, number of steps, eta and weight of classifier-free guidance.

    `image_guidance` is the second weight of networks that edit images: each step then runs the network without text and
    image, without text, and with both (InstructPix2Pix). `tokens` is the number of image tokens of a sample, by which some flow schedules are shifted. `correction` removes the
    quantization error from predictions. `time` converts timesteps for the network (None: as the family does). `listed`
    holds the timesteps where the scheduler does not space them itself. `together` is the number of inputs that a process
    gives the network at once (None: all).

    Raises:
        UsageError: there are more steps than the schedule was trained with, or eta or guidance is not finite.
        ArtifactError: the scheduler does not support these steps, or fails at a trial step.
    """

    family: Family
    scheduler: Any
    steps: int
    eta: float = 0.0
    guidance: float = 1.0
    tokens: int = 0
    correction: NoiseCorrection | None = None
    time: NetworkTime | None = None
    listed: Sequence[float] | None = None
    image_guidance: float | None = None
    together: int | None = None

    @classmethod
    def calibrated(
        cls,
        family: Family,
        config: ForeignConfig,
        sampling: SamplingRecord,
        guidance: float,
        steps: int | None = None,
        name: str | None = None,
    ) -> Self:
        """Return the sampler that a manifest's `sampling` describes; `steps` and `name` override its entries.

        Raises:
            UsageError: the sampler is unknown or does not fit the model's noise schedule, or `steps` differs from the
                length of the list of timesteps.
        """
        scheduler = make_sampler(sampling.scheduler, name)
        listed: Sequence[float] | None = sampling.timesteps
        spacing = sampling.spacing
        if listed is not None and steps is not None and steps != sampling.steps:
            if spacing is None:
                raise UsageError(
                    f"This model was calibrated for a list of {len(listed)} timesteps",
                    where="--steps",
                    fix="Leave it out",
                )
            listed = SchedulerChoices(spacing).listed(scheduler, steps)
        steps = steps or sampling.steps
        time = family.time(config)
        tokens, weight = family.tokens(config), sampling.image_guidance
        return cls(family, scheduler, steps, sampling.eta, guidance, tokens, None, time, listed, weight)

    def __post_init__(self) -> None:
        """Check the schedule with a trial step on zeros, since diffusers reports some errors only in `step`."""
        given = (("--eta", self.eta), ("--guidance", self.guidance), ("--image-guidance", self.image_guidance or 0.0))
        for option, value in given:
            if not math.isfinite(value):
                raise UsageError(f"{value} is not a finite number", where=option)
        trained = self.scheduler.config.get("num_train_timesteps")
        if self.steps < 1 or (isinstance(trained, int) and self.steps > trained):
            raise UsageError(
                f"{self.steps} steps can't be taken of a schedule of {trained or 'any'}",
                where="--steps",
                fix=f"Give a number of steps from 1 to {trained}" if trained else "Give 1 or more",
            )
        channels = 2 if _learns_variance(self.scheduler) else 1
        x, generator = torch.zeros(1, 1, 2, 2), torch.Generator().manual_seed(0)
        with built(f"{type(self.scheduler).__name__} that takes {self.steps} steps", CONFIG), torch.no_grad():
            scheduler = self._fresh()
            if not len(scheduler.timesteps) or not bool(torch.isfinite(scheduler.timesteps).all()):
                raise ValueError("its timesteps are not finite")
            first = scheduler.timesteps[0]
            x_in = getattr(scheduler, "scale_model_input", lambda x, _t: x)(x, first)
            extra = _step_arguments(scheduler, self.eta, [generator])
            scheduler.step(x_in.repeat(1, channels, 1, 1), first, x, **extra)

    def timesteps(self) -> Tensor:
        """Return the distinct timesteps `[T]` that the network receives, in sampling order.

        PLMS repeats its second timestep, so `T` may be less than the number of calls.
        """
        timesteps = self._given(self._fresh().timesteps.to(torch.float32))
        return torch.tensor(list(dict.fromkeys(timesteps.tolist())), dtype=torch.float32)

    @torch.no_grad()
    @step_run()
    def run(
        self,
        model: nn.Module,
        noise: Tensor,
        conditions: Mapping[str, Tensor],
        seeds: list[int] | None = None,
        observer: Observer | None = None,
        null: Mapping[str, Tensor] | None = None,
        calls: CallCheckpoints | None = None,
        start: Tensor | None = None,
        skipped: int = 0,
    ) -> Tensor:
        """Denoise `noise` `[N, C, H, W]` (unit variance) to samples of the same shape, on the network's device.

        Samples of a network with the condition `IMAGE_CONDITION` lack the channels of that condition. With guidance above
        1, `null` is the null condition, `[1, ...]` each, and every call of the network has `2 N` inputs: without condition,
        then with it; with `image_guidance` it has `3 N`, first those without the image too.

        With `start`, samples `[N, C, H, W]`, the first `skipped` steps are left out, and `noise` is added to `start` as at
        the next one (img2img).

        `seeds` gives each sample its own noise source in stochastic samplers, so that a sample does not depend on its
        batch. `observer` is called at every step. `calls` answers for the network what it answered in an interrupted run.
        Where several processes share a command, each runs the network on its part of the inputs.
        """
        scheduler = self._fresh()
        guided = self.guidance > 1 and null is not None
        noise, conditions, null = to_device_of(model, (noise, dict(conditions), None if null is None else dict(null)))
        behind = conditions.get(IMAGE_CONDITION)
        if guided and null is not None:
            conditions = self.asked(conditions, null)
        generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
        extra = _step_arguments(scheduler, self.eta, generators)
        channels = noise.shape[1] if behind is None else noise.shape[1] - behind.shape[1]
        x = noise[:, :channels]
        timesteps = scheduler.timesteps
        if start is None:
            x = x * getattr(scheduler, "init_noise_sigma", 1.0)  # flow schedules start from unscaled noise
        else:
            skipped *= scheduler.order
            x, timesteps = noised(scheduler, to_device_of(model, start), x, skipped), timesteps[skipped:]
        copies = self.inputs_per_image(guided)
        scale = getattr(scheduler, "scale_model_input", lambda x, _t: x)
        for timestep in timesteps:
            x_in = torch.cat([scale(x, timestep)] * copies)
            if behind is not None:
                images = [torch.zeros_like(behind)] * (copies - 2) + [behind] * min(copies, 2)
                x_in = torch.cat([x_in, torch.cat(images)], 1)
            given = self._given(timestep)
            prediction = self.predict(model, x_in, given, conditions, calls)
            if observer is not None:
                observer(x_in, given, prediction)
            if guided:
                prediction = self._with_variance(prediction, x.shape[1], scheduler)
            if prediction.shape[1] == 2 * x.shape[1] and not _learns_variance(scheduler):
                prediction = prediction[:, : x.shape[1]]
            if self.correction is not None:
                x = self._corrected_step(scheduler, prediction, timestep, x, x_in[-len(x) :], extra)
            else:
                x = scheduler.step(self._signed(prediction), timestep, x, **extra).prev_sample
        return x

    def predict(
        self,
        model: nn.Module,
        x: Tensor,
        timestep: Tensor,
        conditions: Mapping[str, Tensor],
        calls: CallCheckpoints | None = None,
    ) -> Tensor:
        """Return the network's prediction for the inputs `x` `[N, C, H, W]` at one timestep; `conditions` are `[N, ...]` each.

        `calls` answers what the network answered in an interrupted run. Where several processes share a command, each of them
        runs the network on its part of the inputs.
        """
        network = partial(computed, model, self.family.predict, model)
        size = len(x) if self.together is None else self.together * world_size()
        parts = []
        for start in range(0, len(x), size):
            rows = slice(start, min(start + size, len(x)))
            given = {name: values[rows] for name, values in conditions.items()}
            call = partial(by_rows, network, x[rows], timestep, given, rows=rows.stop - rows.start)
            parts.append(call() if calls is None else to_device_of(model, calls.output(call)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _signed(self, prediction: Tensor) -> Tensor:
        """Return the network's prediction with the sign that the scheduler expects."""
        return -prediction if self._time.negated else prediction

    def inputs_per_image(self, guided: bool = True) -> int:
        """Return how many inputs an image has in one call: 1, 2 with guidance, 3 with image guidance too."""
        return 1 + guided + (guided and self.image_guidance is not None)

    def asked(self, given: Mapping[str, Tensor], null: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the conditions of all inputs of a guided call: the null condition for each image, then its own."""
        without = self.inputs_per_image() - 1
        return {k: torch.cat([*[null[k].expand_as(v)] * without, v]) for k, v in given.items()}

    def guided(self, prediction: Tensor) -> Tensor:
        """Return the guided prediction of the predictions without conditions, then with them.

        With image guidance `g_i` it is `e(0, 0) + g_i (e(0, image) - e(0, 0)) + g (e(text, image) - e(0, image))`.
        """
        *first, without, with_it = prediction.chunk(self.inputs_per_image())
        guided = without + self.guidance * (with_it - without)
        return guided if self.image_guidance is None else guided + (self.image_guidance - 1) * (without - first[0])

    def _with_variance(self, prediction: Tensor, channels: int, scheduler: Any) -> Tensor:
        """Apply classifier-free guidance; a learned variance comes from the part with the condition."""
        guided = self.guided(prediction)
        with_it = prediction.chunk(self.inputs_per_image())[-1]
        if prediction.shape[1] == 2 * channels and _learns_variance(scheduler):
            guided = torch.cat([guided[:, :channels], with_it[:, channels:]], 1)
        return guided

    def _corrected_step(
        self, scheduler: Any, prediction: Tensor, timestep: Tensor, x: Tensor, x_in: Tensor, extra: dict[str, Any]
    ) -> Tensor:
        """Take a step from the corrected prediction, with the sampler's noise reduced by the residual quantization error."""
        assert self.correction is not None
        given = self._given(timestep)
        channels = x.shape[1]  # a learned variance may follow
        corrected = self.correction.corrected(prediction[:, :channels], given, x_in)
        prediction = self._signed(torch.cat([corrected, prediction[:, channels:]], 1))
        sigma = noise_scale(scheduler, timestep, self.eta)
        generators = extra.get("generator")
        if not sigma or not generators:
            plain: Tensor = scheduler.step(prediction, timestep, x, **extra).prev_sample
            return plain
        states = [generator.get_state() for generator in generators]
        brought = response(scheduler, timestep, extra) ** 2 * self.correction.variance(given)
        after = scheduler.step(prediction, timestep, x, **extra).prev_sample
        # Draw the step's noise again and subtract the excess of its deviation.
        copies = [torch.Generator().manual_seed(0) for _ in states]
        for generator, state in zip(copies, states, strict=True):
            generator.set_state(state)
        noise = torch.cat([torch.randn((1, *x.shape[1:]), generator=generator, dtype=x.dtype) for generator in copies])
        result: Tensor = after - (sigma - max(sigma**2 - brought, 0.0) ** 0.5) * noise.to(after.device)
        return result

    def batches(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        samples: int,
        seed: int,
        batch_size: int,
        conditions: Callable[[int, int], Mapping[str, Tensor]] | None = None,
        observer: Observer | None = None,
        use: str = IMAGES,
        null: Mapping[str, Tensor] | None = None,
        first: int = 0,
        calls: CallCheckpoints | None = None,
    ) -> Iterator[Tensor]:
        """Yield samples `[n, *shape]` in batches, from image `first` up to image `samples`.

        Image i depends on `seed`, i and `use` alone. `calls` keeps the network's outputs in the batch at hand.
        """
        for start in range(first, samples, batch_size):
            stop = min(start + batch_size, samples)
            noise = initial_noise(shape, range(start, stop), seed, use)
            given = {} if conditions is None else conditions(start, stop)
            if calls is not None:
                calls.begin(start)
            yield self.run(model, noise, given, image_seeds(range(start, stop), seed, use), observer, null, calls)

    def _fresh(self) -> Any:
        """Return a scheduler in its initial state, since multistep schedulers keep a history."""
        scheduler = copy.deepcopy(self.scheduler)
        if self.listed is not None:
            return set_listed(scheduler, self.listed)
        config = scheduler.config
        given: dict[str, Any] = {}
        if config.get("use_dynamic_shifting"):
            given["mu"] = _shift(config, self.tokens)
        flow = type(scheduler).__name__.startswith("FlowMatch")
        if flow and self._time.linear_sigmas and not config.get("use_flow_sigmas"):
            given["sigmas"] = [1 - i * (1 - 1 / self.steps) / max(1, self.steps - 1) for i in range(self.steps)]
        try:
            scheduler.set_timesteps(self.steps, **given)
        except ValueError as e:
            raise UsageError(f"{type(scheduler).__name__} can't take {self.steps} steps: {e}", where="--steps") from e
        return scheduler

    def _given(self, timestep: Tensor) -> Tensor:
        """Return the value that the network receives for the scheduler's timestep."""
        return self._time.given(timestep)

    @property
    def _time(self) -> NetworkTime:
        return self.time or self.family.time({})


def noised(scheduler: Any, start: Tensor, noise: Tensor, skipped: int) -> Tensor:
    """Return samples with noise as at the timestep after `skipped` ones, and tell the scheduler that it begins there."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skipped)
    at = scheduler.timesteps[skipped : skipped + 1].expand(len(start))
    if hasattr(scheduler, "add_noise"):
        result: Tensor = scheduler.add_noise(start, noise, at)
    else:  # flow matching
        result = scheduler.scale_noise(start, at, noise)
    return result


def initial_noise(shape: tuple[int, ...], indices: range, seed: int, use: str = IMAGES) -> Tensor:
    """Return the starting noise of the images with these indices, `[len(indices), *shape]`; deterministic."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(image_seed + 1))
            for image_seed in image_seeds(indices, seed, use)
        ]
    )


def image_seeds(indices: range, seed: int, use: str = IMAGES) -> list[int]:
    """Return one even seed per image, for a stochastic sampler's noise; the next odd number seeds the starting noise.

    A seed is 62 bits of a hash of use, seed and index, so different triples don't share noise.
    """
    digests = (hashlib.sha256(f"{use}:{seed}:{index}".encode()).digest() for index in indices)
    return [int.from_bytes(digest[:8], "big") >> 2 << 1 for digest in digests]


def _learns_variance(scheduler: Any) -> bool:
    """Return whether the scheduler reads a learned variance from the second half of a prediction's channels."""
    return str(scheduler.config.get("variance_type")).startswith("learned")


def _shift(config: ForeignConfig, tokens: int) -> float:
    """Return `mu` of a dynamically shifted flow schedule (Flux, SD3.5), which is linear in the number of image tokens."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    result: float = least + (tokens - low) * (most - least) / (high - low)
    return result


def _step_arguments(scheduler: Any, eta: float, generators: list[torch.Generator] | None) -> dict[str, Any]:
    import inspect

    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {}
    if "eta" in accepted:
        extra["eta"] = eta
    if "generator" in accepted and generators is not None:
        extra["generator"] = generators
    return extra

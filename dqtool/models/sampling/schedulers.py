"""diffusers' schedulers for a model's noise schedule, with options for timesteps, clipping and variance. Imports no torch."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.errors import UsageError
from dqtool.models.sources.hints import is_flow

__all__ = [
    "SAMPLERS",
    "SPACINGS",
    "VARIANCES",
    "SchedulerChoices",
    "check_sampler",
    "make_sampler",
    "quadratic_timesteps",
    "scheduler_class",
    "set_listed",
]

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "plms": "PNDMScheduler",
    "dpmsolver": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""Diffusers scheduler classes by their name on the command line."""

FLOW = "FlowMatchEulerDiscreteScheduler"
"""Scheduler class of `euler` for networks trained by flow matching; no other name supports flow schedules."""

CONFIG = "scheduler config"

BARE_COMPONENT = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
"""Schedule of a network without a pipeline: DDIM over 1000 linear betas."""

QUADRATIC = "quad"
SPACINGS = ("leading", "trailing", "linspace", QUADRATIC)
"""Timestep spacings: diffusers' own three, and the quadratic one of the DDIM reference code."""

LISTED = "--spacing quad, --timesteps"
"""Options that list timesteps, as errors name them."""

UNSHIFTED = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""Entries of a flow scheduler's config that leave given noise levels as they are."""

QUADRATIC_SPAN = 0.8
"""Share of the training steps that the quadratic spacing covers."""

VARIANCES = ("fixed_small", "fixed_large", "learned_range")
"""Variances of ancestral sampling (`ddpm`), in diffusers' terms."""


@dataclass(frozen=True)
class SchedulerChoices:
    """Options of a scheduler: timesteps by a spacing or as a list, clipping of the predicted image, ancestral variance.

    None keeps the setting of the model's scheduler.
    """

    spacing: str | None = None
    timesteps: tuple[float, ...] | None = None
    clip: bool | None = None
    variance: str | None = None

    def __post_init__(self) -> None:
        """Raise `UsageError` for a spacing or variance that does not exist, or spacing and list at once."""
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise UsageError(
                f"unknown spacing '{self.spacing}'", where="--spacing", fix=f"Choose from {', '.join(SPACINGS)}"
            )
        if self.variance is not None and self.variance not in VARIANCES:
            raise UsageError(
                f"unknown variance '{self.variance}'", where="--variance", fix=f"Choose from {', '.join(VARIANCES)}"
            )
        if self.spacing is not None and self.timesteps is not None:
            raise UsageError("A list of timesteps has its own spacing", where="--spacing, --timesteps")

    def config(self, class_name: str) -> ForeignConfig:
        """Return the entries of a scheduler's config for these options.

        Raises:
            UsageError: schedulers of this class lack one of the options.
        """
        wanted: dict[str, tuple[str, Any]] = {}
        if self.spacing is not None and self.spacing != QUADRATIC:
            wanted["timestep_spacing"] = ("--spacing", self.spacing)
        if self.clip is not None:
            wanted["clip_sample"] = ("--no-clip", self.clip)
        if self.variance is not None:
            wanted["variance_type"] = ("--variance", self.variance)
        known = _parameters(class_name)
        for key, (option, _) in wanted.items():
            if key not in known:
                raise UsageError(f"{class_name} has no {key}", where=option, fix="Leave it out, or choose --sampler")
        found: dict[str, Any] = {key: value for key, (_, value) in wanted.items()}
        if self.clip is False and "thresholding" in known:
            found["thresholding"] = False
        return found

    def listed(self, scheduler: Any, steps: int) -> tuple[float, ...] | None:
        """Return the explicit timesteps in descending order; None where the scheduler spaces them itself.

        Raises:
            UsageError: the spacing is quadratic, and there are fewer than two steps or the schedule is of flow matching.
        """
        if self.spacing == QUADRATIC and is_flow(_config(scheduler)):
            raise UsageError(
                "The quadratic spacing begins at 80 % of the steps, where samples of flow matching are a fifth image: a "
                "sample that begins there as pure noise stays noisy",
                where="--spacing quad",
                fix="Leave it out, or list timesteps with --timesteps",
            )
        if self.spacing == QUADRATIC:
            return quadratic_timesteps(int(scheduler.config.num_train_timesteps), steps)
        return self.timesteps


def quadratic_timesteps(train_steps: int, steps: int) -> tuple[float, ...]:
    """Return the quadratic timesteps of the DDIM reference code (`--skip_type quad`), in descending order.

    They are the squares of `steps` evenly spaced numbers up to sqrt(0.8 T), truncated to integers, without repetitions.

    Raises:
        UsageError: fewer than two steps.
    """
    if steps < 2:
        raise UsageError(
            "A quadratic spacing of one step has no noise", where="--spacing quad", fix="Give --steps 2 or more"
        )
    last = (train_steps * QUADRATIC_SPAN) ** 0.5
    roots = [*(i * (last / (steps - 1)) for i in range(steps - 1)), last]
    return tuple(float(t) for t in sorted({int(root**2) for root in roots}, reverse=True))


def make_sampler(config: ForeignConfig | None, name: str | None = None, choices: SchedulerChoices | None = None) -> Any:
    """Return a diffusers scheduler with the pipeline's noise schedule: its own, or the one called `name`.

    `config` is the config of the pipeline's scheduler, with its class in `_class_name`.

    Raises:
        UsageError: the name is unknown, the sampler does not support the noise schedule, or it lacks one of `choices`.
        ArtifactError: diffusers lacks the class of the pipeline's scheduler, or the config is invalid for it.
    """
    from dqtool.models.config_schema import built, check_scheduler_config, diffusers_class

    config = dict(config or BARE_COMPONENT)
    own = str(config.get("_class_name", BARE_COMPONENT["_class_name"]))
    check_sampler(name)
    class_name = own if name is None else SAMPLERS[name]
    if name is not None and is_flow(config):
        if name != "euler":
            raise UsageError(
                f"This model was trained by flow matching; {name} follows another noise schedule",
                where="--sampler",
                fix="Leave it out, or choose euler",
            )
        class_name = FLOW
    diffusers_class(own, "SchedulerMixin", f"{CONFIG}, key _class_name")
    if class_name != own:
        if not is_flow(config) and "beta_start" not in _parameters(own):
            raise UsageError(
                f"{name} follows a schedule of betas, and this model was trained on that of {own}, which has none",
                where="--sampler",
                fix="Leave it out: the model's own sampler is used",
            )
        config = {k: v for k, v in config.items() if k not in ("_class_name", "_use_default_values")}
        if name == "plms":
            config["skip_prk_steps"] = True
        if class_name == FLOW and "flow_shift" in config:  # the same number under another key
            config["shift"] = config["flow_shift"]
    cls = diffusers_class(class_name, "SchedulerMixin", f"{CONFIG}, key _class_name")
    config |= {} if choices is None else choices.config(class_name)
    check_scheduler_config(cls, config, CONFIG)
    with built(class_name, CONFIG):
        return cls.from_config(config)


def check_sampler(name: str | None) -> None:
    """Raise `UsageError` for an unknown sampler. None stands for the pipeline's own."""
    if name is not None and name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'.", where="--sampler", fix=f"Choose from {', '.join(SAMPLERS)}")


def scheduler_class(config: ForeignConfig | None, name: str | None = None) -> str:
    """Return the class name of the scheduler that `make_sampler` returns for a network not trained by flow matching."""
    return SAMPLERS.get(name or "") or str((config or BARE_COMPONENT).get("_class_name", BARE_COMPONENT["_class_name"]))


def set_listed(scheduler: Any, timesteps: Sequence[float]) -> Any:
    """Return a scheduler like this one, set to exactly these timesteps.

    Raises:
        UsageError: schedulers of this class take no list of timesteps, or reject this list.
    """
    name = type(scheduler).__name__
    if name == "DDIMScheduler":
        from dqtool.models.sampling.listed_ddim import ListedDDIMScheduler

        scheduler = ListedDDIMScheduler.from_config(scheduler.config)
    flow = is_flow(_config(scheduler))
    # Other schedulers with flow sigmas take the length of a list, and ignore its values.
    takes_list = "timesteps" in inspect.signature(scheduler.set_timesteps).parameters
    if not takes_list or (flow and not name.startswith("FlowMatch")):
        others = "euler" if flow else "ddim, ddpm, euler, lcm"
        raise UsageError(
            f"{name} takes no list of timesteps",
            where=LISTED,
            fix=f"Choose another --sampler ({others}), or leave it out",
        )
    if flow:
        return _set_levels(scheduler, timesteps)
    whole = all(float(t).is_integer() for t in timesteps)
    try:
        scheduler.set_timesteps(timesteps=[int(t) for t in timesteps] if whole else list(timesteps))
    except (ValueError, TypeError, IndexError) as e:
        raise UsageError(f"{name} refuses these timesteps: {e}", where=LISTED) from e
    return scheduler


def _set_levels(scheduler: Any, timesteps: Sequence[float]) -> Any:
    """Return a flow scheduler like this one whose step at timestep t of T has the noise level t / T, as in training.

    Given a list, diffusers would shift the levels by the model's shift and leave the timesteps as they are.

    Raises:
        UsageError: the levels don't fall, or lie outside of the schedule.
    """
    last = scheduler.config.num_train_timesteps
    inverted = bool(scheduler.config.get("invert_sigmas"))
    levels = [1 - t / last if inverted else t / last for t in timesteps]
    if not 0 < levels[-1] <= levels[0] <= 1 or any(not after < before for before, after in pairwise(levels)):
        needed = f"rise from at least 0 to below {last}" if inverted else f"fall from at most {last} to above 0"
        raise UsageError(f"{type(scheduler).__name__} refuses these timesteps: they must {needed}", where=LISTED)
    result = type(scheduler).from_config(scheduler.config, **UNSHIFTED)
    result.set_timesteps(sigmas=levels, timesteps=list(timesteps))
    return result


def _config(scheduler: Any) -> ForeignConfig:
    """Return a scheduler's config with its class."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def _parameters(class_name: str) -> ForeignConfig:
    """Return the entries that configs of a diffusers scheduler can have."""
    import diffusers

    return inspect.signature(getattr(diffusers, class_name).__init__).parameters

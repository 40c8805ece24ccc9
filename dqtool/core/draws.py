"""Selection of training points: the number of points to keep at each step of the sampling trajectory, one function for
each draw.

A draw decides about training points only; the statistics that initialise the quantizers come from every step. Steps are
in sampling order: step 0 has the most noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.errors import UsageError

__all__ = ["DRAWS", "Draw", "DrawInput", "draw_method", "quotas_of", "register"]

Q_DIFFUSION_STEPS = 20
"""Number of evenly spaced steps that Q-Diffusion takes its points from, for any number of sampling steps."""
NORMAL_MEAN, NORMAL_DEVIATION = 0.4, 0.4
"""Mean and standard deviation of PTQ4DM's step distribution, as fractions of the number of steps, counted from the
clean end."""
DIVERSITY = 1.0
"""Weight of the diversity term relative to the density term."""


@dataclass(frozen=True)
class DrawInput:
    """Input of a draw. `features` `[T, n, ...]` are outputs of the network's middle block for n images at each of T
    steps."""

    steps: int
    samples: int
    generator: torch.Generator
    features: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """Registered draw. `function` returns the number of points to keep at each step, `[T]` integers that sum to
    `samples`."""

    name: str
    function: Callable[[DrawInput], Tensor]
    needs_features: bool = False


DRAWS: dict[str, Draw] = {}


def register(name: str, needs_features: bool = False) -> Callable[[Callable[[DrawInput], Tensor]], None]:
    """Return a decorator that registers a function as the draw `--draw name`."""

    def add(function: Callable[[DrawInput], Tensor]) -> None:
        DRAWS[name] = Draw(name, function, needs_features)

    return add


def draw_method(name: str) -> Draw:
    """Return the draw of this name.

    Raises:
        UsageError: no draw has this name; the message lists the names.
    """
    if name not in DRAWS:
        raise UsageError(f"unknown draw '{name}'", where="--draw", fix=f"Choose from {', '.join(DRAWS)}")
    return DRAWS[name]


@register("stratified")
def _stratified(given: DrawInput) -> Tensor:
    """Give every step the same number of points; the steps that get one of the remaining points are drawn at random."""
    quotas = torch.full((given.steps,), given.samples // given.steps)
    quotas[torch.randperm(given.steps, generator=given.generator)[: given.samples % given.steps]] += 1
    return quotas


@register("uniform")
def _uniform(given: DrawInput) -> Tensor:
    """Take equally many points from every c-th step, as Q-Diffusion does (arXiv 2302.04304). c is 1 for 20 steps or
    fewer."""
    chosen = torch.zeros(given.steps)
    chosen[:: max(1, given.steps // Q_DIFFUSION_STEPS)] = 1
    return quotas_of(chosen, given.samples)


@register("normal")
def _normal(given: DrawInput) -> Tensor:
    """Draw the step of each point from N(0.4 T, 0.4 T), as PTQ4DM does (arXiv 2211.15736).

    Steps are counted from the clean end and clipped to the existing ones, so that steps with little noise are drawn
    more often.
    """
    drawn = torch.randn(given.samples, generator=given.generator) * NORMAL_DEVIATION + NORMAL_MEAN
    from_clean = (drawn * (given.steps - 1)).round().clamp(0, given.steps - 1).long()
    return torch.bincount(given.steps - 1 - from_clean, minlength=given.steps)


@register("density", needs_features=True)
def _density(given: DrawInput) -> Tensor:
    """Align the points with the temporal distribution of the features, as EDA-DM does (arXiv 2401.04585).

    A step gets more points if its features are close to those of many other steps (density) and if their directions
    differ from those of other steps (diversity). Two steps are close if their distance is below the median distance
    [ours: the authors set a radius for each data set].
    """
    assert given.features is not None
    features = given.features.flatten(1).double()  # [T, n]
    count = len(features)
    distances = torch.cdist(features, features).square() / features.shape[1]
    others = ~torch.eye(count, dtype=torch.bool)
    radius = distances[others].median() if count > 1 else distances.new_zeros(())
    density = ((distances <= radius) & others).double().sum(1)
    each = given.features.flatten(2).double()  # [T, n images, features of an image]
    cosines = torch.stack([F.cosine_similarity(one[None], each, dim=2).sum(1) for one in each])
    diversity = ((each.shape[1] - cosines) * others).sum(1)
    weights = _from_0_to_1(density) + DIVERSITY * _from_0_to_1(diversity)
    return quotas_of(weights if bool((weights > 0).any()) else torch.ones(count), given.samples)


def quotas_of(weights: Tensor, samples: int) -> Tensor:
    """Distribute `samples` in proportion to `weights` `[T]`; return integers `[T]`. The largest remainders are rounded
    up."""
    exact = weights.double() / weights.double().sum() * samples
    quotas = exact.floor().long()
    left = samples - int(quotas.sum())
    # Ties go to the earlier step, on every platform.
    quotas[(exact - quotas).argsort(descending=True, stable=True)[:left]] += 1
    return quotas


def _from_0_to_1(values: Tensor) -> Tensor:
    """Scale values linearly to [0, 1]; constant values become 0."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)

"""Which points of the sampling trajectory are kept for training: how many at each step. One function a draw.

A draw decides about training points only; the statistics that quantizers start from come from every step. Steps are in
sampling order: row 0 has the most noise.
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
"""Steps that Q-Diffusion takes its points from, at regular intervals, whatever the number of sampling steps."""
NORMAL_MEAN, NORMAL_DEVIATION = 0.4, 0.4
"""Of the steps, counted from the clean end: what PTQ4DM's experiments use."""
DIVERSITY = 1.0
"""Weight of diversity beside density."""


@dataclass(frozen=True)
class DrawInput:
    """What a draw may look at. `features` `[T, n, ...]` are what the middle of the network makes of n images at each step."""

    steps: int
    samples: int
    generator: torch.Generator
    features: Tensor | None = None


@dataclass(frozen=True)
class Draw:
    """A registered draw: `function` returns how many points of each step are kept, `[T]` whole numbers that sum to `samples`."""

    name: str
    function: Callable[[DrawInput], Tensor]
    needs_features: bool = False


DRAWS: dict[str, Draw] = {}


def register(name: str, needs_features: bool = False) -> Callable[[Callable[[DrawInput], Tensor]], None]:
    """Decorator that offers a function under `--draw name`."""

    def add(function: Callable[[DrawInput], Tensor]) -> None:
        DRAWS[name] = Draw(name, function, needs_features)

    return add


def draw_method(name: str) -> Draw:
    """The draw of that name; raises `UsageError` with the names there are."""
    if name not in DRAWS:
        raise UsageError(f"unknown draw '{name}'", where="--draw", fix=f"Choose from {', '.join(DRAWS)}")
    return DRAWS[name]


@register("stratified")
def _stratified(given: DrawInput) -> Tensor:
    """Every step alike; which steps get the points that are left over is drawn."""
    quotas = torch.full((given.steps,), given.samples // given.steps)
    quotas[torch.randperm(given.steps, generator=given.generator)[: given.samples % given.steps]] += 1
    return quotas


@register("uniform")
def _uniform(given: DrawInput) -> Tensor:
    """Q-Diffusion (arXiv 2302.04304): points of every c-th step, as many of each. With 20 steps or fewer c is 1."""
    chosen = torch.zeros(given.steps)
    chosen[:: max(1, given.steps // Q_DIFFUSION_STEPS)] = 1
    return quotas_of(chosen, given.samples)


@register("normal")
def _normal(given: DrawInput) -> Tensor:
    """PTQ4DM's normally distributed time steps (arXiv 2211.15736): each point's step is drawn from N(0.4 T, 0.4 T), counted
    from the clean end and clipped to the steps there are, so that steps with little noise come more often."""
    drawn = torch.randn(given.samples, generator=given.generator) * NORMAL_DEVIATION + NORMAL_MEAN
    from_clean = (drawn * (given.steps - 1)).round().clamp(0, given.steps - 1).long()
    return torch.bincount(given.steps - 1 - from_clean, minlength=given.steps)


@register("density", needs_features=True)
def _density(given: DrawInput) -> Tensor:
    """EDA-DM's temporal distribution alignment (arXiv 2401.04585): a step gets the more points the more other steps its
    features lie close to (density), and the more their directions differ from the others' (diversity).

    Close is nearer than the median distance between steps [ours: the authors set a radius for each data set].
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
    """`samples` shared out in proportion to `weights` `[T]`: whole numbers, the largest remainders rounded up."""
    exact = weights.double() / weights.double().sum() * samples
    quotas = exact.floor().long()
    left = samples - int(quotas.sum())
    # Ties go to the earlier step, on every platform.
    quotas[(exact - quotas).argsort(descending=True, stable=True)[:left]] += 1
    return quotas


def _from_0_to_1(values: Tensor) -> Tensor:
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)

"""Every draw distributes exactly the requested number of points and has its defining property."""

from __future__ import annotations

import pytest
import torch

from dqtool.core.draws import DRAWS, DrawInput, draw_method, quotas_of
from dqtool.errors import UsageError


def given(steps: int, samples: int, seed: int = 0, features: torch.Tensor | None = None) -> DrawInput:
    if features is None:
        features = torch.randn(steps, 4, 3, 2, generator=torch.Generator().manual_seed(1))
    return DrawInput(steps, samples, torch.Generator().manual_seed(seed), features)


@pytest.mark.parametrize("name", list(DRAWS))
@pytest.mark.parametrize(("steps", "samples"), [(1, 1), (4, 18), (20, 5120), (50, 512), (100, 5120)])
def test_quotas_are_whole_sum_up_and_depend_on_the_seed_alone(name: str, steps: int, samples: int) -> None:
    quotas = DRAWS[name].function(given(steps, samples))
    assert quotas.shape == (steps,)
    assert quotas.dtype == torch.long
    assert quotas.sum() == samples
    assert quotas.min() >= 0
    assert torch.equal(quotas, DRAWS[name].function(given(steps, samples)))


def test_uniform_takes_every_fifth_of_a_hundred_steps() -> None:
    quotas = DRAWS["uniform"].function(given(100, 5120))
    assert quotas[::5].tolist() == [256] * 20
    assert quotas.sum() == quotas[::5].sum()


def test_normal_prefers_steps_with_little_noise() -> None:
    quotas = DRAWS["normal"].function(given(100, 20000)).double()
    from_clean = torch.arange(99, -1, -1)
    # Mean and deviation of N(0.4, 0.4) clipped to [0, 1], times 99 steps.
    mean = float((quotas * from_clean).sum() / quotas.sum())
    assert mean == pytest.approx(99 * 0.4237, abs=0.8)
    assert quotas[50:].sum() > quotas[:50].sum()
    assert quotas[-1] == quotas.max()  # clipped: everything below zero


def test_density_rewards_crowds_and_loners() -> None:
    # Six steps with the same features, one near them, one that points elsewhere.
    features = torch.zeros(8, 2, 3)
    features[:, :, 0] = 1
    features[6] = torch.tensor([0.0, 1.0, 0.0])
    features[7] = torch.tensor([-5.0, 0.0, 0.0])
    quotas = DRAWS["density"].function(given(8, 800, features=features))
    assert len(set(quotas[:6].tolist())) <= 2  # equal, except for the remainder
    assert quotas[7] > quotas[6]  # density is equal, diversity is larger
    assert quotas[0] > quotas[6]


def test_density_of_equal_steps_is_even() -> None:
    quotas = DRAWS["density"].function(given(5, 50, features=torch.ones(5, 2, 3)))
    assert quotas.tolist() == [10] * 5


def test_largest_remainders_are_rounded_up() -> None:
    assert quotas_of(torch.tensor([1.0, 1.0, 1.0]), 4).tolist() == [2, 1, 1]
    assert quotas_of(torch.tensor([0.0, 3.0]), 5).tolist() == [0, 5]


def test_unknown_draw_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="stratified"):
        draw_method("nearest")

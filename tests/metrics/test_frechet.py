import math

import pytest
import torch

from dqtool.errors import NumericError, UsageError
from dqtool.metrics.frechet import frechet_distance, minimum_samples, statistics


def random_covariance(dim: int, rank: int, seed: int) -> torch.Tensor:
    root = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T


def general(mean1: torch.Tensor, cov1: torch.Tensor, mean2: torch.Tensor, cov2: torch.Tensor) -> float:
    """The definition, by the eigenvalues of the product itself."""
    cross = torch.linalg.eigvals(cov1 @ cov2).real.clamp(min=0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def test_statistics_are_those_of_numpy() -> None:
    numpy = pytest.importorskip("numpy")
    features = torch.randn(50, 7)
    mean, cov = statistics(features)
    assert mean.dtype == cov.dtype == torch.float64
    numpy.testing.assert_allclose(cov.numpy(), numpy.cov(features.double().numpy(), rowvar=False), rtol=1e-12)
    numpy.testing.assert_allclose(mean.numpy(), features.double().numpy().mean(0), rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_distance_is_the_definition(seed: int) -> None:
    torch.manual_seed(seed)
    args = (
        torch.randn(12).double(),
        random_covariance(12, 20, seed),
        torch.randn(12).double(),
        random_covariance(12, 20, 9),
    )
    assert frechet_distance(*args) == pytest.approx(general(*args), rel=1e-9)
    assert frechet_distance(*args) == pytest.approx(frechet_distance(*args[2:], *args[:2]), rel=1e-9)


def test_commuting_covariances_by_hand() -> None:
    cov1, cov2 = torch.diag(torch.tensor([1.0, 4.0])), torch.diag(torch.tensor([9.0, 4.0]))
    mean1, mean2 = torch.tensor([1.0, 2.0]), torch.tensor([4.0, -2.0])
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(25 + (1 - 3) ** 2)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_singular_covariances(rank: int) -> None:
    zero = torch.zeros(32, dtype=torch.float64)
    singular, full = random_covariance(32, rank, 1), random_covariance(32, 64, 2)
    assert frechet_distance(zero, singular, zero, singular) == pytest.approx(0, abs=1e-5)
    distance = frechet_distance(zero, singular, zero, full)
    assert math.isfinite(distance)
    assert distance == pytest.approx(frechet_distance(zero, full, zero, singular), rel=1e-6)


def test_the_same_samples_are_at_no_distance() -> None:
    stats = statistics(torch.randn(100, 16) * 1e3)
    assert 0 <= frechet_distance(*stats, *stats) < 1e-4


def test_what_can_not_be_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="two samples"):
        statistics(torch.randn(1, 4))
    with pytest.raises(NumericError):
        statistics(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    with pytest.raises(NumericError):
        frechet_distance(torch.zeros(2), torch.full((2, 2), math.nan), torch.zeros(2), torch.eye(2))


def test_minimum_samples_grow_with_the_features() -> None:
    assert minimum_samples(32) == 320
    assert minimum_samples(2048) == 20480
    assert minimum_samples(4) == 256

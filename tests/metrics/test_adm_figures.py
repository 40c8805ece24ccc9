"""FID, sFID, Inception score, precision and recall on fixed features match the suite's formulas within 1e-4 relative."""

from __future__ import annotations

import adm_reference as adm
import numpy as np
import pytest
import torch

from dqtool.errors import NumericError, UsageError
from dqtool.metrics import manifold
from dqtool.metrics.frechet import RunningStatistics, frechet_distance, minimum_samples, statistics
from dqtool.metrics.inception_score import RunningInceptionScore
from dqtool.metrics.manifold import Manifold, precision_recall
from dqtool.metrics.registry import METRICS


def features(count: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """Like pool_3: positive, correlated, some channels dead."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(dim // 2, dim))
    values = np.maximum(random.normal(size=(count, dim // 2)) @ mixing / dim**0.5 + 0.3 + shift, 0)
    values[:, :3] = 0
    return values.astype(np.float32)


@pytest.mark.parametrize("count", [40, 500])
def test_frechet_distance(count: int) -> None:
    a, b = features(count, 96, 1), features(count + 7, 96, 2, shift=0.1)
    found = frechet_distance(*statistics(torch.from_numpy(a)), *statistics(torch.from_numpy(b)))
    expected = adm.frechet_distance(*adm.statistics(a.astype(np.float64)), *adm.statistics(b.astype(np.float64)))
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sizes", [[1] * 30, [30], [7, 0, 22, 1]])
def test_running_statistics_are_those_of_the_whole(sizes: list[int]) -> None:
    values = torch.from_numpy(features(30, 16, 3)).double() + 1e6  # a large mean costs no digits
    running = RunningStatistics()
    for part in values.split(sizes):
        running.update(part)
    mean, cov = running.finish()
    assert running.count == 30
    np.testing.assert_allclose(mean.numpy(), values.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov.numpy(), np.cov(values.numpy() - 1e6, rowvar=False), rtol=1e-7, atol=1e-9)


def test_running_statistics_refuse() -> None:
    with pytest.raises(UsageError):
        RunningStatistics().finish()
    with pytest.raises(NumericError):
        RunningStatistics().update(torch.tensor([[float("inf")]]))


@pytest.mark.parametrize("batch", [1, 37, 5000])
@pytest.mark.parametrize("count", [90, 237])
def test_inception_score(count: int, batch: int) -> None:
    logits = torch.randn(count, 40, generator=torch.Generator().manual_seed(0)) * 3
    running = RunningInceptionScore(split_size=100)
    for part in logits.split(batch):
        running.update(part)
    found, deviation = running.finish()
    assert found == pytest.approx(adm.inception_score(logits.double().softmax(1).numpy(), 100), rel=1e-6)
    assert (deviation > 0) == (count > 100)
    assert len(running.scores) == -(-count // 100)


def test_inception_score_where_probabilities_underflow() -> None:
    running = RunningInceptionScore()
    running.update(torch.nn.functional.one_hot(torch.arange(1000) % 10, 10) * 1000.0)
    assert running.finish() == pytest.approx((10, 0))
    with pytest.raises(UsageError):
        RunningInceptionScore().finish()


@pytest.mark.parametrize(("half", "dtype"), [(False, np.float64), (True, np.float16)])
def test_precision_and_recall(half: bool, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifold, "BLOCK_ELEMENTS", 10_000)  # many blocks of rows
    a, b = features(301, 64, 4), features(244, 64, 5, shift=0.25)
    found = precision_recall(*(Manifold.of(torch.from_numpy(x), half=half) for x in (a, b)))
    assert found == pytest.approx(adm.precision_recall(a, b, dtype), rel=1e-4)
    assert 0 < found[0] < 1 and 0 < found[1] < 1
    assert found[0] != found[1]


def test_precision_and_recall_far_from_the_origin() -> None:
    a, b = features(200, 64, 4), features(200, 64, 5)
    near = precision_recall(Manifold.of(torch.from_numpy(a)), Manifold.of(torch.from_numpy(b)))
    far = precision_recall(Manifold.of(torch.from_numpy(a + 256)), Manifold.of(torch.from_numpy(b + 256)))
    assert far == pytest.approx(near, abs=0.011)


def test_half_distances_that_overflow_are_float32() -> None:
    a = torch.from_numpy(features(50, 64, 6)) * 1e3
    assert torch.equal(Manifold.of(a, half=True).radii, Manifold.of(a).radii)


def test_a_set_against_itself() -> None:
    itself = Manifold.of(torch.randn(50, 8))
    assert precision_recall(itself, itself) == (1.0, 1.0)
    with pytest.raises(UsageError, match="more than 3"):
        Manifold.of(torch.randn(3, 8))
    with pytest.raises(NumericError):
        Manifold.of(torch.full((5, 2), float("nan")))


def test_the_warning_bounds_of_the_registry_are_those_of_the_distance() -> None:
    assert METRICS["fid"].minimum_samples == minimum_samples(2048)
    assert METRICS["sfid"].minimum_samples == minimum_samples(2023)

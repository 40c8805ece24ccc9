"""Fréchet distance between two Gaussians fitted to features (Heusel et al., arXiv 1706.08500, Eq. 6)."""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.errors import NumericError, UsageError

__all__ = ["RunningStatistics", "frechet_distance", "minimum_samples", "statistics"]


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean `[D]` and covariance `[D, D]` of `features` `[N, D]`, both float64, with the divisor N - 1 of
    `np.cov`.

    Raises:
        UsageError: there are fewer than two samples.
        NumericError: a feature is NaN or Inf.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UsageError(
            f"A Fréchet distance needs features [N, D] of at least two samples, got {tuple(features.shape)}.",
            fix="Raise --samples.",
        )
    running = RunningStatistics()
    running.update(features)
    return running.finish()


class RunningStatistics:
    """Mean and covariance of features that arrive in batches, with the memory of two D x D matrices.

    Batches are merged by their own means (Chan, Golub, LeVeque 1979), so that a large mean costs no precision.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add `features` `[N, D]`.

        Raises:
            NumericError: a feature is NaN or Inf.
        """
        features = features.detach().double()
        if not torch.isfinite(features).all():
            raise NumericError(
                "The features of the images hold NaN or Inf.", fix="Look at the images: the model diverged."
            )
        if len(features) == 0:
            return
        mean = features.mean(dim=0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self._mean, self._scatter = len(features), mean, scatter
            return
        total = self.count + len(features)
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += torch.outer(shift, shift) * (self.count * len(features) / total)
        self._mean = self._mean + shift * (len(features) / total)
        self.count = total

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return mean `[D]` and covariance `[D, D]`, as `statistics` does.

        Raises:
            UsageError: there were fewer than two samples.
        """
        if self.count < 2:
            raise UsageError("A Fréchet distance needs at least two samples.", fix="Raise --samples.")
        return self._mean, self._scatter / (self.count - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return `|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)` in float64, at least 0, of means `[D]` and covariances `[D, D]`.

    `tr (C1 C2)^½` is computed as `tr (C1^½ C2 C1^½)^½`. That matrix is symmetric and positive semi-definite, so an
    eigendecomposition suffices, singular covariances included. A general matrix square root would have imaginary
    round-off.

    Raises:
        NumericError: a value is NaN or Inf.
    """
    mean1, cov1, mean2, cov2 = (x.detach().double() for x in (mean1, cov1, mean2, cov2))
    if not all(bool(torch.isfinite(x).all()) for x in (mean1, cov1, mean2, cov2)):
        raise NumericError("The statistics of a Fréchet distance hold NaN or Inf.", fix="Look at the images.")
    values, vectors = torch.linalg.eigh((cov1 + cov1.T) / 2)
    root1 = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root1 @ cov2 @ root1
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    result: float = max(0.0, distance.item())
    return result


def minimum_samples(dim: int) -> int:
    """Return the number of samples below which a warning is shown: 10 for each of `dim` features, at least 256.

    A covariance of N samples has a rank of N - 1 at most, and the bias of the distance falls as 1/N. The rule gives
    20480 for InceptionV3's 2048 features, similar to the customary 10-50 thousand.
    """
    return max(256, 10 * dim)

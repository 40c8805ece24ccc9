"""Precision and recall of samples against a reference (Kynkäänniemi et al., arXiv 1904.06991, Eq. 1-3), as in the ADM
suite.

The manifold of a set is the union of balls around its features, each of which reaches to the k-th nearest neighbour.
Precision is the share of samples inside the reference's manifold; recall is the share of the reference inside the
samples' manifold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dqtool.errors import NumericError, UsageError

__all__ = ["NEIGHBOURS", "Manifold", "precision_recall"]

NEIGHBOURS = 3
"""Neighbours that a ball reaches to, the k of the paper."""
BLOCK_ELEMENTS = 1 << 25
"""Distances computed at once: 128 MiB of float32."""


@dataclass(frozen=True)
class Manifold:
    """Features `[N, D]` float32 and the squared radius of each ball, `radii` `[N]`.

    `half` rounds distances to float16, as the suite does (unless they overflow, see `squared_distances`).
    """

    features: Tensor
    radii: Tensor
    half: bool = False

    @classmethod
    def of(cls, features: Tensor, neighbours: int = NEIGHBOURS, *, half: bool = False) -> Manifold:
        """Return the manifold of `features` `[N, D]`; each ball reaches to the `neighbours`-th nearest other feature.

        Raises:
            UsageError: there are not more features than neighbours.
            NumericError: a feature is NaN or Inf.
        """
        if features.ndim != 2 or len(features) <= neighbours:
            raise UsageError(
                f"Precision and recall need more than {neighbours} samples, got {len(features)}.",
                fix="Raise --samples.",
            )
        features = features.detach().float()
        if not torch.isfinite(features).all():
            raise NumericError(
                "The features of the images hold NaN or Inf.", fix="Check the images: the model has probably diverged."
            )
        rows = max(1, BLOCK_ELEMENTS // len(features))
        # The nearest feature is the feature itself, so the k-th other one is number k + 1.
        radii = [
            squared_distances(block, features, half=half).topk(neighbours + 1, dim=1, largest=False).values[:, -1]
            for block in features.split(rows)
        ]
        return cls(features, torch.cat(radii), half)

    def covers(self, points: Tensor) -> Tensor:
        """Return for each of `points` `[M, D]` whether it lies in the manifold, `[M]` bool."""
        rows = max(1, BLOCK_ELEMENTS // len(self.features))
        return torch.cat(
            [
                (squared_distances(block, self.features, half=self.half) <= self.radii).any(dim=1)
                for block in points.detach().float().split(rows)
            ]
        )


def precision_recall(reference: Manifold, samples: Manifold) -> tuple[float, float]:
    """Return precision and recall of `samples`, each in [0, 1]. The two sets may differ in size."""
    precision = reference.covers(samples.features).double().mean().item()
    return precision, samples.covers(reference.features).double().mean().item()


def squared_distances(a: Tensor, b: Tensor, *, half: bool = False) -> Tensor:
    """Return `|a_i|² - 2 a_i·b_j + |b_j|²`, at least 0, `[len(a), len(b)]` float32.

    With `half` every operand and result is rounded to float16, and products are summed in float32. If any value
    overflows, all distances are computed in float32.
    """
    if half:
        distances = _half_distances(a, b)
        if torch.isfinite(distances).all():
            return distances
    # Moving the origin changes the round-off error only: far from the origin the three terms cancel.
    origin = b.mean(dim=0)
    a, b = a - origin, b - origin
    return (a.square().sum(dim=1)[:, None] - 2 * a @ b.T + b.square().sum(dim=1)).clamp(min=0)


def _half_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances with operands and results rounded to float16."""

    def rounded(x: Tensor) -> Tensor:
        return x.half().float()

    a, b = rounded(a), rounded(b)
    norm_a, norm_b = (rounded(rounded(x.square()).sum(dim=1)) for x in (a, b))
    doubled = rounded(2 * rounded(a @ b.T))
    return rounded(rounded(norm_a[:, None] - doubled) + norm_b).clamp(min=0)

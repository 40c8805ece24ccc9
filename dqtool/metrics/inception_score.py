"""Inception score (Salimans et al., arXiv 1606.03498) from the logits of any classifier."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dqtool import report
from dqtool.errors import UsageError

__all__ = ["RunningInceptionScore", "inception_score"]


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Return mean and population standard deviation of `exp(E KL(p(y|x) || p(y)))` over splits, for `logits` `[N, C]`.

    The score lies between 1 and C. Splits are consecutive and of nearly equal length.

    Raises:
        UsageError: there are fewer samples than splits.
    """
    count = len(logits)
    if splits < 1 or count < splits:
        raise UsageError(f"An Inception score over {splits} splits can't be taken of {count} samples.")
    log_p = torch.log_softmax(logits.detach().double(), dim=1)
    scores = []
    for part in log_p.tensor_split(splits):
        log_marginal = part.logsumexp(dim=0) - math.log(len(part))
        divergence = (part.exp() * (part - log_marginal)).nan_to_num(nan=0.0).sum(dim=1)
        scores.append(divergence.mean().exp())
    values = torch.stack(scores)
    return values.mean().item(), values.std(correction=0).item()


FEW = 0.2
"""Share of a full part below which the last part distorts the score."""


class RunningInceptionScore:
    """Inception score as in the ADM suite: over consecutive parts of 5000 samples, of which the last may be shorter.

    Only sums over classes are kept, so logits may come in batches of any size. `p log p` is 0 where p underflows.
    """

    def __init__(self, split_size: int = 5000) -> None:
        self.split_size = split_size
        self.scores: list[float] = []
        self._count = 0
        self._negentropy = 0.0
        self._total = torch.zeros(0, dtype=torch.float64)

    def update(self, logits: Tensor) -> None:
        """Add `logits` `[N, C]`."""
        while len(logits):
            part = logits[: self.split_size - self._count]
            logits = logits[len(part) :]
            log_p = torch.log_softmax(part.detach().double(), dim=1)
            p = log_p.exp()
            self._negentropy += float((p * log_p).nan_to_num(nan=0.0).sum())
            self._total = p.sum(dim=0) if self._count == 0 else self._total + p.sum(dim=0)
            self._count += len(part)
            if self._count == self.split_size:
                self._close()

    def finish(self) -> tuple[float, float]:
        """Return mean and population standard deviation over the parts.

        Raises:
            UsageError: no samples were added.
        """
        if self.scores and 0 < self._count < FEW * self.split_size:
            report.warn(
                f"is: the last part has {self._count} images and counts as much as a part of {self.split_size}; give --samples "
                f"a multiple of {self.split_size}"
            )
        if self._count:
            self._close()
        if not self.scores:
            raise UsageError("An Inception score needs at least one sample.", fix="Raise --samples.")
        values = torch.tensor(self.scores, dtype=torch.float64)
        return values.mean().item(), values.std(correction=0).item()

    def _close(self) -> None:
        """Add the score of one part: E KL(p(y|x) || p(y)) is the mean of sum p log p minus sum m log m of the marginal
        m."""
        marginal = self._total / self._count
        divergence = self._negentropy / self._count - float(torch.special.xlogy(marginal, marginal).sum())
        self.scores.append(math.exp(divergence))
        self._count, self._negentropy = 0, 0.0

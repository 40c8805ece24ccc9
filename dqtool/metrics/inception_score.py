"""The Inception score (Salimans et al., arXiv 1606.03498) of whatever classifier gave the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dqtool.errors import UsageError

__all__ = ["RunningInceptionScore", "inception_score"]


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and population standard deviation over splits of `exp(E KL(p(y|x) || p(y)))` for `logits [N, C]`.

    Between 1 and C. Splits are consecutive stretches of nearly equal length. Raises `UsageError` if there are fewer
    samples than splits.
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


class RunningInceptionScore:
    """The Inception score as the ADM suite takes it: over consecutive parts of 5000 samples, the last one shorter.

    Keeps sums over classes only, so that logits may come in batches of any size. `p log p` is 0 where p underflows.
    """

    def __init__(self, split_size: int = 5000) -> None:
        self.split_size = split_size
        self.scores: list[float] = []
        self._count = 0
        self._negentropy = 0.0
        self._total = torch.zeros(0, dtype=torch.float64)

    def update(self, logits: Tensor) -> None:
        """Take in `logits [N, C]`."""
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
        """Mean and population standard deviation over the parts; `UsageError` without samples."""
        if self._count:
            self._close()
        if not self.scores:
            raise UsageError("An Inception score needs at least one sample.", fix="Raise --samples.")
        values = torch.tensor(self.scores, dtype=torch.float64)
        return values.mean().item(), values.std(correction=0).item()

    def _close(self) -> None:
        """E KL(p(y|x) || p(y)) = mean of sum p log p, less sum m log m of the marginal m."""
        marginal = self._total / self._count
        divergence = self._negentropy / self._count - float(torch.special.xlogy(marginal, marginal).sum())
        self.scores.append(math.exp(divergence))
        self._count, self._negentropy = 0, 0.0

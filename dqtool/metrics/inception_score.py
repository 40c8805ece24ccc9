"""The Inception score (Salimans et al., arXiv 1606.03498) of whatever classifier gave the logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dqtool.errors import UsageError

__all__ = ["inception_score"]


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

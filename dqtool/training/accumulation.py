"""Gradients of a batch, added up over parts of it: the memory of a part, the gradient of the whole."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["backward"]


def backward(loss: Callable[[Tensor], Tensor], rows: Tensor, together: int | None = None) -> float:
    """Add the gradients of the mean `loss` over the samples `rows` `[N]`, of which it sees `together` at a time (None:
    all); returns that mean. Sums are made in another order then, so results agree up to rounding."""
    total = 0.0
    for part in rows.split(together or len(rows)):
        share = loss(part) * (len(part) / len(rows))
        share.backward()
        total += share.item()
    return total

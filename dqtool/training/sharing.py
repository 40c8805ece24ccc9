"""Shares of the training samples: each process of a command keeps the activations of its own samples and learns from them.

A batch has the same samples whatever the number of processes. Each process computes the gradients of those that are its
own, and the sum over all processes moves the parameters of each. The order of sums is the only difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dqtool.distributed import add_up, rank, row_counts, world_size
from dqtool.errors import UsageError

if TYPE_CHECKING:
    from dqtool.training.optimizer import QuantAdam

__all__ = ["Share", "add_gradients", "part_of"]


@dataclass(frozen=True)
class Share:
    """The samples of this process among `samples`: every n-th for n processes, so that all have samples of every step.

    Raises:
        UsageError: there are fewer samples than processes.
    """

    samples: int

    def __post_init__(self) -> None:
        """Raise `UsageError` if a process gets no sample."""
        if self.samples < world_size():
            raise UsageError(
                f"{self.samples} training samples are too few for {world_size()} processes",
                where="--nproc",
                fix="Take fewer processes, or calibrate with more --samples",
            )

    def __len__(self) -> int:
        return len(range(rank(), self.samples, world_size()))

    def indices(self, rows: slice) -> slice:
        """Return the indices among all samples of the rows of this share; `rows` has a start and a stop."""
        step = world_size()
        return slice(rank() + rows.start * step, rank() + (rows.stop - 1) * step + 1, step)

    def among(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return those of the samples `chosen` that are in this share: their indices, and their rows in the share."""
        step = world_size()
        if step == 1:
            return chosen, chosen
        mine = chosen[chosen % step == rank()]
        return mine, mine // step


def part_of(chosen: Tensor) -> Tensor:
    """Return this process's part of samples that every process has at hand."""
    if world_size() == 1:
        return chosen
    counts = row_counts(len(chosen))
    start = sum(counts[: rank()])
    return chosen[start : start + counts[rank()]]


def add_gradients(optimizer: QuantAdam, loss: Tensor) -> Tensor:
    """Add up the gradients and the losses of all processes; return the sum of the losses, float64. Alone, nobody reads the loss."""
    if world_size() == 1:
        return loss
    return torch.tensor(add_up(optimizer.gradients(), float(loss)), dtype=torch.float64)

"""Losses of a training run: the host learns them a few at a time where reading one would wait for an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.training.recovery import WINDOW, Recovery

__all__ = ["Losses"]


class Losses:
    """Losses of the iterations, which `recovery` judges.

    On the CPU each is read at once. On an accelerator they are read once in `WINDOW` iterations, as many as `recovery` looks at
    together: the device then never waits for the host. A divergence is seen up to a window later there, and losses between it and
    the return to an earlier state are not judged.

    Attributes:
        history: losses that were read, in order.
    """

    def __init__(self, history: list[float], recovery: Recovery) -> None:
        self.history, self.recovery = history, recovery
        self._pending: list[Tensor] = []

    def add(self, loss: Tensor) -> bool:
        """Note the loss of an iteration after its update. Return False if training must stop."""
        self._pending.append(loss.detach())
        return len(self._pending) < window(loss) or self.read()

    def read(self) -> bool:
        """Read what is pending, and return what `add` does. Call it before a checkpoint and after the last iteration."""
        values = torch.stack(self._pending).cpu().tolist() if self._pending else []
        self._pending.clear()
        before, going = self.recovery.retries, True
        for value in values:
            if going and self.recovery.retries == before:
                going = self.recovery.should_continue(value, len(self.history))
            self.history.append(value)
        return going


def window(loss: Tensor) -> int:
    """Return after how many iterations losses on the device of `loss` are read."""
    return 1 if loss.device.type == "cpu" else WINDOW

"""Recovery from divergence: back to the best state, again at a lower rate, at last the state before training.

A rate that suits all models may still be too high for a block with extreme values. Hours of other blocks must not be lost
for it, so a divergence costs its own block at most, and the artifact says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from dqtool import report
from dqtool.errors import NumericError
from dqtool.training.data import BlockStore
from dqtool.training.optimizer import QuantAdam

__all__ = ["BlockStates", "Recovery", "States", "StoredStates"]

BACKOFF = 0.25
"""The rates are multiplied by this at each divergence."""
RETRIES = 3
"""After this many divergences the state before training is kept."""
WINDOW = 20
"""Losses whose mean tells how training goes."""
DIVERGED = 10.0
"""Training has diverged when the loss is this many times the first ones, and above the target's own mean square."""


class States:
    """Values of the optimizer's parameters to go back to. This one keeps them where `save` and `load` put them."""

    def __init__(
        self, load_best: Callable[[], Sequence[Tensor] | None], initial: Callable[[], Sequence[Tensor]]
    ) -> None:
        self.load_best, self.initial = load_best, initial

    def record(self, _loss: float) -> None:
        """Learn the mean loss of the last iterations."""

    def best(self) -> Sequence[Tensor]:
        """Return the best values known."""
        found = self.load_best()
        return self.initial() if found is None else found


class BlockStates(States):
    """States of one block, in memory: those before training, and those with the lowest mean loss so far."""

    def __init__(self, optimizer: QuantAdam) -> None:
        first = optimizer.values()
        self.optimizer, self.found, self.lowest = optimizer, first, math.inf
        super().__init__(lambda: self.found, lambda: first)

    def record(self, loss: float) -> None:
        """Keep the values at hand where the loss is the lowest so far."""
        if loss < self.lowest and self.optimizer.is_finite():
            self.found, self.lowest = self.optimizer.values(), loss


class Recovery:
    """Watches the losses of one training.

    `where` names it in messages, `power` is the mean square of the target. `rate` multiplies the learning rates. With
    `strict` a divergence is an error. `warnings` gets a sentence where the state before training is kept.
    """

    def __init__(
        self, optimizer: QuantAdam, states: States, where: str, power: float, *, strict: bool, warnings: list[str]
    ) -> None:
        self.optimizer, self.states, self.where, self.power = optimizer, states, where, power
        self.strict, self.warnings = strict, warnings
        self.rate = 1.0
        self.gave_up = False
        self._retries = 0
        self._first: float | None = None
        self._recent: list[float] = []

    def should_continue(self, loss: float, step: int) -> bool:
        """Take in the loss of iteration `step`, after its update. Return False where training must stop: the parameters then
        have their values from before it.

        Raises:
            NumericError: training diverged, and `strict` forbids to go on.
        """
        self._recent.append(loss)
        finite = math.isfinite(loss)
        if finite and len(self._recent) < WINDOW:
            return True
        mean = sum(self._recent) / len(self._recent) if finite else math.inf
        self._recent.clear()
        if self._first is None and finite:
            self._first = mean
        if finite and not (mean > DIVERGED * (self._first or mean) and mean > self.power):
            self.states.record(mean)
            return True
        return self._back(step)

    def _back(self, step: int) -> bool:
        if self.strict:
            raise NumericError(
                "The distillation loss diverged",
                where=f"{self.where}, iteration {step}",
                fix="Leave out --strict to keep such a block as calibrated, or check the calibration with `dqtool inspect`",
            )
        self._retries += 1
        if self._retries <= RETRIES:
            self.rate *= BACKOFF
            self.optimizer.restart(self.states.best())
            report.warn(
                f"training of {self.where} diverged at iteration {step}; it goes on at {self.rate:g} of the rate"
            )
            return True
        self.optimizer.restart(self.states.initial())
        self.gave_up = True
        self.warnings.append(f"training of {self.where} diverged {self._retries} times; it stays as calibrated")
        report.warn(self.warnings[-1])
        return False


class StoredStates(States):
    """States of a whole network, in the store of its training: those before it, saved by `begin`, and the last checkpoint.

    The checkpoint is under `key`. A network's values need not be in memory a second time.
    """

    def __init__(self, store: BlockStore, key: str, optimizer: QuantAdam) -> None:
        self.store, self.key, self.optimizer = store, key, optimizer
        super().__init__(self._checkpoint, self._before)

    def begin(self) -> None:
        """Save the values before training."""
        self.store.save(f"{self.key} start", {str(i): x for i, x in enumerate(self.optimizer.values())})

    def _checkpoint(self) -> Sequence[Tensor] | None:
        kept = self.store.load(self.key)
        return None if kept is None else self.optimizer.values_in(kept)

    def _before(self) -> Sequence[Tensor]:
        kept = self.store.load(f"{self.key} start")
        assert kept is not None
        return [kept[str(i)] for i in range(len(kept))]

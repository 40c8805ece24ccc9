"""Recovery from divergence: return to the best state, retry at a lower rate, and finally keep the state before
training.

A rate that suits all models may be too high for a block with extreme values. The hours spent on other blocks must not
be lost, so a divergence affects its own block only, and the artifact reports it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts.checkpoints import PieceStore
from dqtool.errors import NumericError
from dqtool.training.optimizer import QuantAdam

__all__ = ["WINDOW", "BlockStates", "Recovery", "States", "StoredStates"]

BACKOFF = 0.25
"""Factor of the rates after each divergence."""
RETRIES = 3
"""Number of divergences after which the state before training is kept."""
WINDOW = 20
"""Number of consecutive losses whose mean is compared."""
DIVERGED = 10.0
"""Training has diverged when the mean loss is this many times the first one and above the target's mean square."""


class States:
    """Saved values of the optimizer's parameters. This base class stores nothing itself: it calls `load_best` and
    `initial`."""

    def __init__(
        self, load_best: Callable[[], Sequence[Tensor] | None], initial: Callable[[], Sequence[Tensor]]
    ) -> None:
        self.load_best, self.initial = load_best, initial

    def record(self, _loss: float) -> None:
        """Take note of the mean loss of the last iterations."""

    def best(self) -> Sequence[Tensor]:
        """Return the best saved values, or the initial ones."""
        found = self.load_best()
        return self.initial() if found is None else found


class BlockStates(States):
    """States of one block in memory: the values before training, and those with the lowest mean loss so far."""

    def __init__(self, optimizer: QuantAdam) -> None:
        first = optimizer.values()
        self.optimizer, self.found, self.lowest = optimizer, first, math.inf
        super().__init__(lambda: self.found, lambda: first)

    def record(self, loss: float) -> None:
        """Save the current values if the mean loss is the lowest so far."""
        if loss < self.lowest and self.optimizer.is_finite():
            self.found, self.lowest = self.optimizer.values(), loss

    def state(self) -> dict[str, Tensor]:
        """Return the best values and their loss, enough to resume; the initial ones are those of the calibrated block."""
        best = {f"best.{i}": values for i, values in enumerate(self.found)}
        return {**best, "lowest": torch.tensor(self.lowest, dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        device = self.found[0].device if self.found else None
        self.found = [state[f"best.{i}"].to(device) for i in range(len(self.found))]
        self.lowest = float(state["lowest"])


class Recovery:
    """Monitors the losses of one training run.

    Attributes:
        where: name of the trained part in messages.
        power: mean square of the target.
        rate: factor of the learning rates.
        strict: a divergence raises an error.
        warnings: receives a sentence when the state before training is kept.
    """

    def __init__(
        self, optimizer: QuantAdam, states: States, where: str, power: float, *, strict: bool, warnings: list[str]
    ) -> None:
        self.optimizer, self.states, self.where, self.power = optimizer, states, where, power
        self.strict, self.warnings = strict, warnings
        self.rate = 1.0
        self._retries = 0
        self._first: float | None = None
        self._recent: list[float] = []

    @property
    def retries(self) -> int:
        """Return how often training went back to an earlier state."""
        return self._retries

    def should_continue(self, loss: float, step: int) -> bool:
        """Record the loss of iteration `step` after its update; return False if training must stop.

        The parameters have their values from before training when it returns False.

        Raises:
            NumericError: training diverged and `strict` is set.
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

    def state(self) -> dict[str, Tensor]:
        """Return the rate, the retries and the losses that the next decision looks at, enough to resume."""
        first = math.nan if self._first is None else self._first
        return {"recovery": torch.tensor([self.rate, self._retries, first, *self._recent], dtype=torch.float64)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        rate, retries, first, *recent = state["recovery"].tolist()
        self.rate, self._retries, self._recent = rate, int(retries), recent
        self._first = None if math.isnan(first) else first

    def _back(self, step: int) -> bool:
        """Restore an earlier state after a divergence; return False if it is the one before training."""
        if self.strict:
            raise NumericError(
                "The distillation loss diverged",
                where=f"{self.where}, iteration {step}",
                fix="Leave out --strict to keep the calibrated state of such a block, or check the calibration with `dqtool inspect`",
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
        self.warnings.append(f"training of {self.where} diverged {self._retries} times; it stays as calibrated")
        report.warn(self.warnings[-1])
        return False


class StoredStates(States):
    """States of a whole network in the store of its training: the values before it, saved by `begin`, and the last
    checkpoint.

    The checkpoint is stored under `key`. The network's values are therefore not in memory twice.
    """

    def __init__(self, store: PieceStore, key: str, optimizer: QuantAdam) -> None:
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

"""Recovery from divergence: a block returns to its best state, retries at a lower rate and finally stays as calibrated."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from dqtool.errors import NumericError
from dqtool.training.bkd import BkdLearner, distill_blocks
from dqtool.training.block_loop import Learner, block_state
from dqtool.training.methods.lsq import METHOD as LSQ
from dqtool.training.on_policy import centre_weights, refine
from dqtool.training.optimizer import QuantAdam
from dqtool.training.options import BkdOptions, OnPolicyOptions, Rates
from dqtool.training.recovery import BACKOFF, BlockStates, Recovery

if TYPE_CHECKING:
    from distillation_tasks import Silent

    from dqtool.training.data import DistillationTask

WILD = Rates(weight=1e30, bias=1e30)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_a_block_that_always_diverges_stays_as_calibrated(task: DistillationTask, silent: Silent) -> None:
    name = task.trace.blocks[0].name
    task.only = [name]
    before = block_state(task.student)
    found = distill_blocks(task, BkdOptions(iters=60, batch_size=4, rates=WILD), silent)
    assert equal(block_state(task.student), before)
    assert task.warnings == [f"training of block '{name}' diverged 4 times; it stays as calibrated"]
    assert all(math.isfinite(loss) for loss in found["loss_curve"])
    again: list[str] = task.warnings[:]
    task.warnings.clear()
    distill_blocks(task, BkdOptions(iters=60, batch_size=4, rates=WILD), silent)
    assert task.warnings == again  # a resumed run repeats the warnings


def test_strict_makes_it_an_error(task: DistillationTask, silent: Silent) -> None:
    task.strict = True
    with pytest.raises(NumericError, match="diverged"):
        distill_blocks(task, BkdOptions(iters=60, batch_size=4, rates=WILD), silent)


def test_one_bad_iteration_goes_back_and_on_at_a_lower_rate(
    task: DistillationTask, silent: Silent, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.only = [task.trace.blocks[0].name]
    rates: list[float] = []
    step = QuantAdam.step

    def watched(self: QuantAdam, present: torch.Tensor, factor: float = 1.0) -> None:
        rates.append(factor)
        step(self, present, factor)

    monkeypatch.setattr(QuantAdam, "step", watched)
    monkeypatch.setattr(BkdLearner, "rate_factor", lambda _self, _step: 1.0)
    monkeypatch.setattr(
        BkdLearner, "objective", lambda _self, loss, at: loss * math.nan if at == 30 else loss, raising=False
    )
    before = block_state(task.student)
    distill_blocks(task, BkdOptions(iters=60, batch_size=4), silent)
    after = block_state(task.student)
    assert task.warnings == []
    assert not equal(after, before)
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert rates[0] == 1.0
    assert rates[-1] == BACKOFF


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_passes_over_the_network_keep_the_calibrated_one(
    task: DistillationTask, silent: Silent, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    centre_weights(task.student)
    before = block_state(task.student)
    step = QuantAdam.step

    def poisoned(self: QuantAdam, present: torch.Tensor, factor: float = 1.0) -> None:
        for parameter in self.parameters:
            parameter.grad.fill_(bad)
        step(self, present, factor)

    monkeypatch.setattr(QuantAdam, "step", poisoned)
    found = refine(task, OnPolicyOptions(iters=30, batch_size=4, images=2, refresh=30), silent)
    assert equal(block_state(task.student), before)
    assert task.warnings == ["training of all blocks diverged 4 times; it stays as calibrated"]
    assert all(math.isfinite(loss) for loss in found.losses)
    task.warnings.clear()
    LSQ.train(task, LSQ.options(iters=30, batch_size=4), silent.bars)
    assert task.warnings == ["training of the network diverged 4 times; it stays as calibrated"]
    assert equal(block_state(task.student), before)


def test_a_rising_loss_is_a_divergence_only_above_the_target(task: DistillationTask) -> None:
    learner: Any = Learner(task, QuantAdam(task.student.requires_grad_(True), Rates()), 1, 1)
    recovery = Recovery(
        learner.optimizer, BlockStates(learner.optimizer), "it", 1.0, strict=False, warnings=task.warnings
    )
    for step in range(20):
        assert recovery.should_continue(1e-6, step)
    for step in range(20):
        assert recovery.should_continue(1e-3, step)  # a thousand times higher, and still below the target's power
    assert recovery.rate == 1.0
    for step in range(20):
        assert recovery.should_continue(2.0, step)
    assert recovery.rate == BACKOFF

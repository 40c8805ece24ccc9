"""Interrupted training of one block goes on from its last saved iteration to the same bits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from distillation_tasks import Silent

from dqtool.training.bkd import distill_blocks
from dqtool.training.block_loop import AT_HAND, block_state
from dqtool.training.options import BkdOptions, Rates

if TYPE_CHECKING:
    from dqtool.training.data import DistillationTask

CALM = BkdOptions(iters=30, batch_size=4)
WILD = BkdOptions(iters=60, batch_size=4, rates=Rates(weight=3.0, bias=3.0))


@pytest.mark.parametrize("options", [CALM, WILD], ids=["calm", "diverging"])
@pytest.mark.parametrize("stop", [1, 17, 45])
def test_it_goes_on_to_the_same_bits(task: DistillationTask, options: BkdOptions, stop: int) -> None:
    task.only = [task.trace.blocks[0].name, task.trace.blocks[1].name]
    task.checkpoint_seconds = 0.0
    other = copy.deepcopy(task)
    found = distill_blocks(task, options, Silent())
    resumed = copy.deepcopy(other)
    with pytest.raises(KeyboardInterrupt):
        distill_blocks(other, options, Silent(stop_after=stop))
    resumed.store = other.store
    progress = Counting()
    again = distill_blocks(resumed, options, progress)
    before, after = block_state(task.student), block_state(resumed.student)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again["block_loss"] == found["block_loss"]
    assert task.warnings == resumed.warnings
    if options is CALM:  # a divergence goes back further, to the best state
        assert progress.skipped >= stop - 2  # an iteration at most is made again


def test_another_block_does_not_take_it(task: DistillationTask) -> None:
    first, second = task.trace.blocks[0].name, task.trace.blocks[1].name
    task.checkpoint_seconds = 0.0
    task.only = [first]
    other = copy.deepcopy(task)
    with pytest.raises(KeyboardInterrupt):
        distill_blocks(other, CALM, Silent(stop_after=5))
    assert other.store.load(AT_HAND) is not None
    kept, other = other.store, copy.deepcopy(task)
    other.store, other.only, task.only = kept, [second], [second]
    distill_blocks(other, CALM, Silent())
    distill_blocks(task, CALM, Silent())
    before, after = block_state(task.student), block_state(other.student)
    assert all(torch.equal(before[name], after[name]) for name in before)


class Counting(Silent):
    """Counts the iterations that an earlier run had made."""

    skipped = 0

    def skip(self, n: int = 1, note: str | None = None) -> None:
        self.skipped += n

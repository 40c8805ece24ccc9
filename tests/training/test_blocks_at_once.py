"""Blocks that are trained at once: the same bits by any number of processes and after any interruption."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_tasks import Silent
from processes import in_processes
from torch import nn

from dqtool.artifacts import Workspace
from dqtool.errors import NumericError
from dqtool.training.assignment import assign, block_macs, longest_share
from dqtool.training.bkd import distill_at_once
from dqtool.training.blocks_at_once import _units
from dqtool.training.data import DistillationTask
from dqtool.training.options import BkdOptions, Rates

OPTIONS = BkdOptions(iters=3, batch_size=8)
SOME = ["conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0", "mid_block.resnets.0", "conv_out"]


@pytest.fixture
def few(task: DistillationTask) -> DistillationTask:
    """Return a task of some blocks, without a second sweep, whose state is saved after each iteration."""
    names = [info.name for info in task.trace.blocks]
    return replace(task, only=[name for name in SOME if name in names], repair_iters=0, checkpoint_seconds=0.0)


def parameters_of(task: DistillationTask) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in task.student.named_parameters()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())


def trained(task: DistillationTask, store: Any = None, progress: Silent | None = None) -> dict[str, torch.Tensor]:
    mine = copy.deepcopy(task)
    if store is not None:
        mine.store = store
    distill_at_once(mine, OPTIONS, (progress or Silent()).bars)
    return parameters_of(mine)


class Counting(Silent):
    """Counts the iterations that were made, and those that an earlier run had made."""

    made = skipped = 0

    def advance(self, n: int = 1, note: str | None = None) -> None:
        super().advance(n)
        self.made += n

    def skip(self, n: int = 1, note: str | None = None) -> None:
        self.skipped += n


def test_several_processes_train_to_the_bits_of_one(few: DistillationTask, tmp_path: Path) -> None:
    def work() -> tuple[dict[str, torch.Tensor], Any, int]:
        mine = replace(copy.deepcopy(few), store=Workspace(tmp_path / "out.safetensors", "key"))
        progress = Counting()
        metrics = distill_at_once(mine, OPTIONS, progress.bars)
        return parameters_of(mine), metrics["block_loss"], progress.made

    one = copy.deepcopy(few)
    losses = distill_at_once(one, OPTIONS, Silent().bars)["block_loss"]
    found = in_processes(3, work)
    assert all(same(parameters_of(one), parameters) and told == losses for parameters, told, _ in found)
    assert sum(made for _, _, made in found) == OPTIONS.iters * len(few.only or ())
    assert min(made for _, _, made in found) > 0
    again = in_processes(2, work)
    assert all(same(parameters_of(one), parameters) and told == losses for parameters, told, _ in again)
    assert sum(made for _, _, made in again) == 0


@pytest.mark.parametrize("stop", [1, 4, 8, 14])
def test_an_interrupted_sweep_goes_on_to_the_same_bits(few: DistillationTask, tmp_path: Path, stop: int) -> None:
    whole = trained(few)

    def store() -> Workspace:
        return Workspace(tmp_path / "out.safetensors", "key")

    with pytest.raises(KeyboardInterrupt):
        trained(few, store(), Silent(stop_after=stop))
    assert store().count
    progress = Counting()
    resumed = in_processes(2, lambda: trained(few, store())) if stop == 8 else [trained(few, store(), progress)]
    assert all(same(whole, found) for found in resumed)
    assert stop == 8 or (progress.skipped >= stop - 1 and progress.made + progress.skipped == 3 * len(few.only or ()))


def test_a_damaged_piece_is_made_again(few: DistillationTask, tmp_path: Path) -> None:
    whole = trained(few, Workspace(tmp_path / "out.safetensors", "key"))
    pieces = sorted((tmp_path / ".out.safetensors.partial").glob("*conv_in%20*own"))
    assert pieces
    for piece in pieces:
        piece.write_bytes(piece.read_bytes()[:-1] + b"?")
    assert same(whole, trained(few, Workspace(tmp_path / "out.safetensors", "key")))


def test_the_repair_lowers_the_errors_that_prefixes_left(task: DistillationTask) -> None:
    task.repair_iters = 4
    metrics: Any = distill_at_once(task, replace(OPTIONS, iters=8), Silent().bars)
    names = [info.name for info in task.trace.blocks]
    assert list(metrics["block_loss"]) == list(metrics["repair_block_loss"]) == names
    before, after = (sum(pair[i] for pair in metrics["repair_block_loss"].values()) for i in (0, 1))
    assert after < before
    assert metrics["repair_curve"]


def test_warnings_of_all_processes_are_told_once(few: DistillationTask, tmp_path: Path) -> None:
    wild = BkdOptions(iters=60, batch_size=4, rates=Rates(weight=1e30, bias=1e30))
    few.checkpoint_seconds = 30.0

    def work(strict: bool = False) -> list[str]:
        store = Workspace(tmp_path / str(strict), "key")
        mine = replace(copy.deepcopy(few), only=["conv_in", "conv_out"], warnings=[], store=store, strict=strict)
        distill_at_once(mine, wild, Silent().bars)
        return mine.warnings

    first, second = in_processes(2, work)
    assert first == second == work()
    assert [line.split("'")[1] for line in first] == ["conv_in", "conv_out"]
    with pytest.raises(NumericError, match="diverged"):
        work(strict=True)


def test_blocks_that_share_parameters_stay_together() -> None:
    one, two, three, four = (nn.Linear(2, 2) for _ in range(4))
    three.weight = one.weight
    both = nn.Sequential(two, three)
    assert _units({0: one, 2: two, 3: four}) == [[0], [2], [3]]
    assert _units({0: one, 1: four, 2: two, 3: both}) == [[0, 2, 3], [1]]


def test_work_is_divided_by_its_cost() -> None:
    assert assign([1, 8, 3, 4], 2) == [1, 0, 1, 1]
    assert assign([1, 1], 3) == [0, 1]
    assert assign([], 2) == []
    assert longest_share([1, 8, 3, 4], 2) == 0.5
    assert longest_share([1, 8, 3, 4], 9) == 0.5
    layers = [("a.conv", 5), ("a.attn", 2), ("ab", 7)]
    assert block_macs(["a", "ab"], layers) == [7, 7]

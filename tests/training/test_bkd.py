"""Distillation lowers every block's loss, is reproducible and resumes after an interruption."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from dqtool.nn.surgery import packed_state
from dqtool.training.bkd import distill_blocks
from dqtool.training.data import DistillationTask
from dqtool.training.on_policy import images_for, refine, student_trajectory
from dqtool.training.options import BkdOptions, OnPolicyOptions

OPTIONS = BkdOptions(iters=12, batch_size=8, refine_iters=6, refine_images=4, refine_refresh=3)
SECOND = OPTIONS.second_pass()


def test_losses_fall_and_nothing_but_quantized_layers_moves(task: DistillationTask, silent: Any) -> None:
    frozen = {k: v.clone() for k, v in task.student.state_dict().items() if "norm" in k}
    metrics = distill_blocks(task, OPTIONS, silent)
    first = sum(pair[0] for pair in metrics["block_loss"].values())
    last = sum(pair[1] for pair in metrics["block_loss"].values())
    assert last < first
    assert 0 <= metrics["outside_training_share"] <= 1
    for name, value in frozen.items():
        assert torch.equal(task.student.state_dict()[name], value)


def test_an_interrupted_run_ends_with_the_same_bits(task: DistillationTask, silent: Any) -> None:
    whole, half = copy.deepcopy(task), copy.deepcopy(task)
    distill_blocks(whole, OPTIONS, silent)

    resumed = copy.deepcopy(half)
    with pytest.raises(KeyboardInterrupt):
        distill_blocks(half, OPTIONS, type(silent)(OPTIONS.iters * 4 + 5))
    assert len(half.store.kept) == 4  # type: ignore[attr-defined]
    resumed.store = half.store
    distill_blocks(resumed, OPTIONS, silent)
    expected, got = packed_state(whole.student), packed_state(resumed.student)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_own_trajectory_is_the_students_and_its_targets_the_teachers(task: DistillationTask, silent: Any) -> None:
    own, targets = student_trajectory(task, 3, 0)
    assert len(own) == 3 * len(task.trajectory.timesteps)
    x, timestep, conditions = own.arguments(slice(3, 6))
    with torch.no_grad():
        expected = task.family.predict(task.teacher, x, timestep, conditions)
    torch.testing.assert_close(targets[3:6], expected, rtol=1e-5, atol=1e-6)


def test_no_more_points_are_sampled_than_the_iterations_draw() -> None:
    options = OnPolicyOptions(iters=300, batch_size=32, images=128, refresh=150)
    assert images_for(options, 0, steps=20) == 128
    assert images_for(options, 0, steps=100) == 48  # 150 iterations draw 4800 points
    assert images_for(options, 299, steps=20) == 2


def test_refine_trains_all_blocks_together(task: DistillationTask, silent: Any) -> None:
    before = task.student.conv_out.weight.detach().clone()
    metrics = refine(task, SECOND, silent)
    assert not torch.equal(before, task.student.conv_out.weight)
    assert len(metrics.losses) == SECOND.iters


@pytest.mark.parametrize("stop", [2, 4])  # before and after the trajectory is drawn again
def test_an_interrupted_pass_over_all_blocks_ends_with_the_same_bits(
    task: DistillationTask, silent: Any, stop: int
) -> None:
    task.checkpoint_seconds = 0
    whole, half = copy.deepcopy(task), copy.deepcopy(task)
    expected = refine(whole, SECOND, silent)
    with pytest.raises(KeyboardInterrupt):
        refine(half, SECOND, type(silent)(stop))
    task.store = half.store
    metrics = refine(task, SECOND, silent)
    assert metrics.losses == expected.losses
    wanted, got = packed_state(whole.student), packed_state(task.student)
    for name in wanted:
        assert torch.equal(wanted[name], got[name]), name

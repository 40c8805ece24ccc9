"""Gradients accumulated over parts equal those of the batch; training with little memory gives the same result."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.artifacts import open_artifact
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.shared.settings import RunSettings
from dqtool.training.data import DistillationTask
from dqtool.training.network_loop import accumulate_gradients
from dqtool.training.on_policy import refine, student_trajectory
from dqtool.training.options import BkdOptions


@pytest.mark.parametrize("together", [None, 1, 4, 6, 100])
def test_parts_add_up_to_the_gradient_of_the_whole(together: int | None) -> None:
    torch.manual_seed(0)
    layer, x, y = nn.Linear(5, 3), torch.randn(12, 5), torch.randn(12, 3)
    rows = torch.randperm(12)[:10]  # 4 and 6 do not divide it
    whole = F.mse_loss(layer(x[rows]), y[rows])
    (expected,) = torch.autograd.grad(whole, [layer.weight])
    seen: list[int] = []

    def loss(part: Tensor) -> Tensor:
        seen.append(len(part))
        return F.mse_loss(layer(x[part]), y[part])

    assert float(accumulate_gradients(loss, rows, together)) == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-5, atol=1e-7)
    assert sum(seen) == 10
    assert max(seen) <= (together or 10)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_how_many_sample_together_changes_neither_points_nor_their_order(
    task: DistillationTask, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dqtool.artifacts.checkpoints.EVERY", 0.0)  # calls of one size are no calls of another
    sampler = replace(task.sampler, guidance=guidance)
    asked = torch.tensor([0, 1, 2, 3]).repeat(len(task.trajectory))[: len(task.trajectory)]
    # The tiny network ignores conditions; the test checks only which condition belongs to which point.
    trajectory = replace(task.trajectory, conditions={"label": torch.arange(4.0)[:, None]}, subjects=asked)
    family = Unconditional(task.family)
    whole = replace(task, trajectory=trajectory, sampler=replace(sampler, family=family), family=family)
    expected, answers = student_trajectory(whole, 6, 0)
    points, targets = student_trajectory(replace(whole, network_batch=4), 6, 0)
    torch.testing.assert_close(points.x, expected.x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(targets, answers, rtol=1e-4, atol=1e-4)
    assert torch.equal(points.rows, expected.rows)
    assert points.subjects is not None
    assert expected.subjects is not None
    assert torch.equal(points.subjects, expected.subjects)
    images = 6 if guidance == 1 else 3
    if guidance > 1:  # without condition first, then with it
        assert (expected.subjects[:images] == 3).all()
        assert (expected.subjects[images : 2 * images] != 3).all()


class Unconditional:
    """Family that receives conditions and ignores them."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def predict(self, model: nn.Module, x: Tensor, timestep: Tensor, _conditions: Any) -> Tensor:
        return self.family.predict(model, x, timestep, {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)


def test_the_pass_over_all_blocks_in_parts_is_the_same_pass(task: DistillationTask, silent: Any) -> None:
    options = BkdOptions(refine_iters=4, refine_images=4, refine_refresh=4, batch_size=8).second_pass()
    whole, parts = copy.deepcopy(task), replace(copy.deepcopy(task), network_batch=2)
    expected, got = refine(whole, options, silent).losses, refine(parts, options, silent).losses
    assert got[0] == pytest.approx(expected[0], rel=1e-4)
    # Weights start at the centres of their codes, where a scale's gradient is 0 and float rounding decides its sign.
    assert got == pytest.approx(expected, rel=0.25)
    # With little memory the float network is dropped after its last prediction.
    assert all(p.is_meta for p in parts.teacher.parameters())
    assert not any(p.is_meta for p in whole.teacher.parameters())


def test_low_memory_keeps_activations_on_disk_and_is_another_result_to_the_cache(
    chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dqtool.training.tensor_store as tensor_store

    spilled: list[int] = []
    allocate = tensor_store._allocate
    monkeypatch.setattr(tensor_store, "_allocate", lambda path, size: (spilled.append(size), allocate(path, size))[1])

    def made(name: str, **options: Any) -> Any:
        given = DistillOptions(
            str(chain / "calibrated.safetensors"), str(chain / name), iters=2, refine_iters=1, **options
        )
        return open_artifact(distill(given, RunSettings(quiet=True)))

    usual = made("usual.safetensors")
    assert not spilled
    little = made("little.safetensors", low_memory=True)
    assert spilled
    assert little.manifest.fingerprint != usual.manifest.fingerprint
    a, b = usual.tensors(), little.tensors()
    assert a.keys() == b.keys()
    name = "mid_block.resnets.0.conv1.weight_scale"
    torch.testing.assert_close(a[name], b[name], rtol=1e-2, atol=0)

"""Weights quantized once for all parts of a batch give the same predictions bit for bit and equal gradients up to
rounding."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.block_loop import make_trainable
from dqtool.training.data import DistillationTask
from dqtool.training.held_weights import held_weights
from dqtool.training.network_loop import accumulate_gradients
from dqtool.training.optimizer import QuantAdam
from dqtool.training.options import Rates
from dqtool.training.recompute import recomputed_blocks


@pytest.mark.parametrize("bits", ["4/4", "8/8"])
def test_gradients_are_those_of_weights_quantized_in_every_pass(make_task: object, bits: str) -> None:
    task: DistillationTask = make_task(bits=bits)  # type: ignore[operator]
    make_trainable(task.student)
    optimizer = QuantAdam(task.student, Rates())
    with torch.no_grad():
        targets = task.predict(task.teacher, slice(None))

    def error(part: Tensor) -> Tensor:
        return F.mse_loss(task.predict(task.student, part), targets[part])

    found = []
    for held in (False, True):
        optimizer.zero_grad()
        with (
            held_weights(task.student) if held else nullcontext(),
            recomputed_blocks(task.student, task.trace),
        ):
            loss = accumulate_gradients(error, torch.arange(8), 3)
        found.append((loss, [p.grad.clone() for p in optimizer.parameters]))
    (loss, expected), (again, grads) = found
    assert again == loss
    assert any(bool(g.any()) for g in expected)
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()) + 1e-8)


def test_weights_are_quantized_twice_whatever_the_number_of_parts(
    task: DistillationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_trainable(task.student)
    optimizer = QuantAdam(task.student, Rates())
    layers = [m for m in task.student.modules() if isinstance(m, FakeQuantLayer)]
    calls = {"plain": 0}
    original = FakeQuantLayer.quantized_weight

    def counted(self: FakeQuantLayer) -> Tensor:
        calls["plain"] += 1
        return original(self)

    monkeypatch.setattr(FakeQuantLayer, "quantized_weight", counted)
    optimizer.zero_grad()
    with held_weights(task.student):
        accumulate_gradients(lambda part: task.predict(task.student, part).square().mean(), torch.arange(8), 2)
    assert calls["plain"] == len(layers)  # once for the gradient; the codes are made by another function

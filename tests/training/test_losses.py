"""Losses of a training run: on an accelerator the host reads them once in a window, and training waits for nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_tasks import Silent
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dqtool.training import losses
from dqtool.training.block_loop import Learner, device_mean_square, make_trainable, mean_square, own_layers, train_block
from dqtool.training.data import DistillationTask
from dqtool.training.losses import Losses
from dqtool.training.optimizer import QuantAdam, Rates
from dqtool.training.options import RoundingOptions
from dqtool.training.reconstruction import RoundingLearner
from dqtool.training.recovery import WINDOW, BlockStates, Recovery
from dqtool.training.replay import Replay
from dqtool.training.sharing import Share


class Reads(TorchDispatchMode):
    """Counts the numbers that leave a tensor: on a GPU each waits for it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_an_iteration_reads_no_number_of_the_device(task: DistillationTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "window", lambda _: WINDOW)  # an accelerator's
    asked: list[int] = []
    read = Losses.read

    def noted(self: Losses) -> bool:
        asked.append(len(self._pending))
        return read(self)

    monkeypatch.setattr(Losses, "read", noted)
    trace, info = task.trace, task.trace.blocks[1]
    samples = len(task.trajectory)

    def run(model: nn.Module, rows: slice) -> None:
        task.predict(model, rows)

    teacher, student = (Replay(net, trace, samples, run, 8, 1 << 30) for net in (task.teacher, task.student))
    for each in (teacher, student):
        first = each.inputs(0)
        each.advance(0, each.outputs(0, first), first)
    wanted, given = teacher.inputs(1), student.inputs(1)
    target = teacher.outputs(1, wanted)
    counts = []
    for iters in (4, 4 + WINDOW):
        block = task.student.get_submodule(info.name)
        make_trainable(block)

        def make(module: nn.Module, iters: int = iters) -> Learner:
            return Learner(task, QuantAdam(module, Rates()), iters, 8)

        task.checkpoint_seconds = 1e9
        with Reads() as reads:
            history = train_block(
                task, Share(samples), block, given, target, make, torch.Generator(), Silent(), info.name
            )
        assert len(history) == iters
        counts.append(reads.count)
    # A window of iterations more costs one look at whether the parameters are finite (one number for each kind).
    assert counts[1] - counts[0] <= 10 < WINDOW
    assert asked == [4, WINDOW, 4]


def test_no_training_loop_waits_for_a_device(made: Path, tmp_path: Path) -> None:
    """Blocks, the second pass, the time embedding and whole networks, on a device that counts what would wait for a GPU."""
    command = [sys.executable, str(Path(__file__).with_name("waits.py")), made / "calibrated.safetensors", tmp_path]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert {method: each["waits"] for method, each in found.items()} == {"bkd": {}, "qat-partial": {}}
    assert [each["iterations"] for each in found.values()] == [36, 36]


def test_the_mean_square_on_a_device_is_that_of_the_host() -> None:
    random = torch.Generator().manual_seed(0)
    outputs = [torch.randn(70, 3, generator=random), torch.randn(33, 5, 2, generator=random), torch.zeros(2, 2)]
    assert float(device_mean_square(outputs)) == mean_square(outputs)
    assert float(device_mean_square([torch.zeros(3, 3)])) == mean_square([torch.zeros(3, 3)]) == 1.0


@pytest.mark.parametrize("error", [0.37, 1e-7, 12345.678])
def test_a_unit_on_a_device_is_that_of_the_host(task: DistillationTask, error: float) -> None:
    layer = own_layers(task.student)[0]
    outputs = [torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(1))]
    learner = RoundingLearner(task, layer, [layer], RoundingOptions())
    learner.observe_targets(outputs)
    host = learner.objective(torch.tensor(error), 0)
    learner.observe_targets(outputs, device_mean_square(outputs))
    assert isinstance(learner.unit, torch.Tensor)
    assert torch.equal(learner.objective(torch.tensor(error), 0), host)


def recovery_of(parameter: nn.Parameter) -> Recovery:
    module = nn.Module()
    module.weight = parameter
    optimizer = QuantAdam(module, Rates())
    return Recovery(optimizer, BlockStates(optimizer), "a test", 1.0, strict=False, warnings=[])


def test_losses_after_a_divergence_are_not_judged_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "window", lambda _: 6)
    recovery = recovery_of(nn.Parameter(torch.zeros(1)))
    reader = Losses([], recovery)
    assert all(reader.add(torch.tensor(x)) for x in (1.0, 2.0, float("nan"), float("nan"), float("inf"), 9.0))
    assert recovery.retries == 1 and len(reader.history) == 6


def test_on_the_cpu_every_loss_is_read_at_once() -> None:
    reader = Losses([], recovery_of(nn.Parameter(torch.zeros(1))))
    for number in range(3):
        assert reader.add(torch.tensor(float(number))) and reader.history[-1] == number

"""Memory of activations that a run on shapes predicts, beside what PyTorch's allocator reports of a run on numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dqtool.stages.planning.activations import Activations, LiveBytes, activations
from dqtool.training.block_loop import make_trainable, output_loss
from dqtool.training.data import DistillationTask

BATCH = 16


def allocated(run: Callable[[], object]) -> int:
    """The most bytes that a function had from the allocator at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events: Any = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def test_tensors_count_while_they_live() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        assert live.now == 8000
        del a
        c = b.relu_()
        assert live.now == 4000 and live.peak == 8000
        del b, c
    assert live.now == 0


def test_a_run_on_shapes_predicts_what_the_allocator_gives(task: DistillationTask) -> None:
    """Beside tensors the allocator gives kernels their working memory; both are in the order of the prediction."""
    names = [block.name for block in task.trace.blocks]
    teacher = task.teacher

    def arguments(rows: slice) -> dict[str, Any]:
        x, timestep, conditions = task.trajectory.arguments(rows)
        return task.family.arguments(x, timestep, conditions) | {"return_dict": False}

    found = activations(copy.deepcopy(teacher).to("meta"), names, arguments(slice(0, 1)))
    rows = slice(0, BATCH)
    with torch.no_grad():
        teacher(**arguments(rows))
        whole = allocated(lambda: teacher(**arguments(rows)))
    assert 0.6 * whole < BATCH * found.forward < 1.2 * whole

    most = max(learning(task, name) for name in names)
    assert 0.5 * most < BATCH * (found.trained + found.block) < 2 * most


def learning(task: DistillationTask, name: str) -> int:
    """The most bytes of one iteration of a block on `BATCH` samples."""
    block = task.student.get_submodule(name)
    kept: list[Any] = []
    handle = block.register_forward_hook(lambda _m, a, k, y: kept.append((a, k, y)), with_kwargs=True)
    with torch.no_grad():
        task.predict(task.student, slice(0, BATCH))
    handle.remove()
    args, kwargs, target = kept[0]
    task.select_rows(slice(0, BATCH))
    make_trainable(block)

    def iterate() -> None:
        output_loss(block(*args, **kwargs), target, torch.arange(BATCH)).backward()

    iterate()
    block.zero_grad()
    return allocated(iterate)


def test_the_largest_part_of_a_training_counts() -> None:
    found = Activations(forward=10, block=3, trained=20, between=100)
    assert found.calibrating(4) == 40
    assert found.distilling(0, 2, 1) == 2 * 23 + 200
    assert found.distilling(1000, 2, 1) == 3000

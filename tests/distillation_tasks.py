"""Fixtures of training tests: a tiny distillation task, new for each test."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.training.data import DistillationTask

__all__ = ["Memory", "Silent", "base_task", "make_task", "prediction_error", "silent", "task"]


class Memory:
    """Block store in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, Mapping[str, Tensor]] = {}

    def load(self, key: str) -> Mapping[str, Tensor] | None:
        return self.kept.get(key)

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self.kept[key] = {k: v.clone() for k, v in tensors.items()}

    def alone(self) -> Memory:
        return self


class Silent:
    """Reporter without output, which can interrupt the run after a number of iterations."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.left = stop_after

    def advance(self, n: int = 1, note: str | None = None) -> None:
        if self.left is not None:
            self.left -= n
            if self.left < 0:
                raise KeyboardInterrupt

    def skip(self, n: int = 1, note: str | None = None) -> None: ...

    def bars(self, what: str, total: int) -> AbstractContextManager[Silent]:
        return nullcontext(self)


MakeTask = Callable[..., Any]


@pytest.fixture(scope="session")
def make_task(made: Path) -> MakeTask:
    """Return the function `make_task(artifact, **options)`, which builds a task with these options of `distill`."""
    from dqtool.artifacts import open_artifact
    from dqtool.models.networks.loading import network_of
    from dqtool.models.networks.packed import layer_infos
    from dqtool.models.networks.recorded_graph import graph_of
    from dqtool.models.sampling.sampler import Sampler, make_sampler
    from dqtool.nn.assignment import assign_bits
    from dqtool.stages.distill import DistillOptions, network_spec
    from dqtool.stages.shared.artifact_models import split_dilated, student_of, teacher_of, trace_of
    from dqtool.training.data import DistillationTask, Trajectory

    def make(artifact: Path | None = None, **options: Any) -> DistillationTask:
        calibrated = open_artifact(artifact or made / "calibrated.safetensors")
        manifest, tensors = calibrated.manifest, calibrated.tensors()
        family, _ = network_of(manifest.network)
        chosen = DistillOptions(**options)
        student = student_of(
            manifest,
            tensors,
            assign_bits(layer_infos(manifest.layers), network_spec(chosen, manifest), split_dilated(tensors)[1]),
            chosen.static,
        )
        sampling = manifest.sampling
        return DistillationTask(
            family,
            teacher_of(manifest, tensors),
            student,
            trace_of(manifest),
            Trajectory(tensors["trajectory.x"], tensors["trajectory.rows"], tensors["timesteps"]),
            Sampler(family, make_sampler(sampling.scheduler), sampling.steps, sampling.eta),
            0,
            Memory(),
            graph_of(manifest),
        )

    return make


@pytest.fixture(scope="session")
def base_task(make_task: MakeTask) -> DistillationTask:
    return make_task()


@pytest.fixture
def task(base_task: DistillationTask) -> DistillationTask:
    """Return a copy of a 4/4 network's task, with its quantizers initialised."""
    return copy.deepcopy(base_task)


@pytest.fixture
def silent() -> Silent:
    return Silent()


def prediction_error(task: DistillationTask) -> float:
    """Relative squared error of the student's predictions on the trajectory."""
    import torch

    with torch.no_grad():
        wanted = task.predict(task.teacher, slice(None))
        got = task.predict(task.student, slice(None))
    return float((got - wanted).square().sum() / wanted.square().sum())

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from dqtool.artifacts import CallCheckpoints, Checkpoints, Workspace, checkpoints


def test_iterations_of_an_earlier_run_are_found_up_to_the_first_gap(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "x", "key")
    loop = Checkpoints(workspace, "rows", every=0.0)
    assert loop.found == {}
    for index in range(3):
        loop.add(index, {"a": torch.full((2,), index), "b/c": torch.tensor(index)})
    again = Checkpoints(Workspace(tmp_path / "x", "key"), "rows")
    assert [int(again.found[i]["b/c"]) for i in again.found] == [0, 1, 2]
    assert Checkpoints(workspace, "row").found == {}  # another loop's
    (workspace.directory / "rows%201.tensors").write_bytes(b"damaged")
    assert list(Checkpoints(Workspace(tmp_path / "x", "key"), "rows").found) == [0]


def test_it_saves_when_it_is_time(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "x", "key")
    loop = Checkpoints(workspace, "rows", every=1e9)
    loop.add(0, {"a": torch.ones(1)})
    assert workspace.keys() == []
    loop.every = 0.0
    loop.add(1, {"a": torch.ones(1)})
    assert workspace.keys() == ["rows 0"]
    assert list(Checkpoints(workspace, "rows").found) == [0, 1]


def test_calls_of_an_unfinished_iteration_are_answered_from_the_file(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "x", "key")
    made: list[int] = []

    def call(value: int) -> torch.Tensor:
        made.append(value)
        return torch.full((2,), value)

    calls = CallCheckpoints(workspace, "loop", every=0.0)
    for iteration in (0, 8):
        calls.begin(iteration)
        for value in range(3):
            calls.output(lambda value=10 * iteration + value: call(value))
    again = CallCheckpoints(Workspace(tmp_path / "x", "key"), "loop", every=0.0)
    made.clear()
    again.begin(8)
    found = [int(again.output(lambda value=value: call(value))[0]) for value in range(5)]
    assert found == [80, 81, 82, 3, 4]
    assert made == [3, 4]
    again.begin(16)
    assert int(again.output(lambda: call(7))[0]) == 7
    assert Checkpoints(workspace, "loop").found == {}


def test_saves_that_take_long_are_forty_seconds_apart_at_most(tmp_path: Path) -> None:
    calls = CallCheckpoints(Workspace(tmp_path / "x", "key"), "loop")
    calls._cost = 1000.0
    for age, saved in ((30.0, False), (41.0, True)):
        calls._saved = time.monotonic() - age
        calls.output(lambda: torch.ones(1))
        assert (calls.workspace.load(calls.key) is not None) is saved


def test_too_many_bytes_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "CALL_BYTES", 20)
    workspace = Workspace(tmp_path / "x", "key")
    calls = CallCheckpoints(workspace, "loop", every=0.0)
    calls.begin(0)
    assert [float(calls.output(lambda value=value: torch.full((2,), value))[0]) for value in (1.0, 2.0, 3.0)] == [
        1,
        2,
        3,
    ]
    again = CallCheckpoints(workspace, "loop")
    again.begin(0)
    assert [float(again.output(lambda: torch.zeros(2))[0]) for _ in range(3)] == [1, 2, 0]

from __future__ import annotations

from pathlib import Path

import torch

from dqtool.artifacts import Checkpoints, Workspace


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

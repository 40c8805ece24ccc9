"""The next writer finishes or undoes the commit of a killed one, wherever it was killed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dqtool.artifacts import Manifest, check_writable, commit, commit_directory, lock, open_artifact
from dqtool.artifacts.records import MetricsRecord
from dqtool.artifacts.schema import unchecked

PRINT = "0" * 64


def killed_after(moves: int, work: Callable[[], None]) -> None:
    """Do the work in a process that is gone before it moves anything for the `moves + 1`-th time."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    done = 0

    def counted(move: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any) -> None:
            nonlocal done
            if done == moves:
                os._exit(0)
            done += 1
            move(*arguments)

        return counting

    try:
        os.rename, os.replace = counted(os.rename), counted(os.replace)
        work()
    finally:
        os._exit(0)


def version(path: Path) -> int:
    return int(open_artifact(path).manifest.metrics.as_read["version"])


def write(path: Path, number: int) -> None:
    note = Manifest(stage="export", fingerprint=PRINT, metrics=unchecked({"version": number}, MetricsRecord))
    if path.suffix:
        commit(path, {"version": torch.tensor(number)}, note)
    else:
        commit_directory(path, lambda new: (new / "version").write_text(str(number)), note)


@pytest.mark.parametrize("name", ["x.safetensors", "x"])
@pytest.mark.parametrize("existed", [False, True])
@pytest.mark.parametrize("number", range(5))
def test_a_kill_between_any_two_moves(tmp_path: Path, name: str, existed: bool, number: int):
    path = tmp_path / name
    if existed:
        write(path, 1)
    killed_after(number, lambda: write(path, 2))
    check_writable(path, "artifact" if path.suffix else "directory")
    with lock(path):
        pass
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".")]
    assert version(path) == 2, "all that was moved was whole before the first move"
    write(path, 3)
    assert version(path) == 3


def test_a_kill_before_the_first_move_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "x.safetensors"
    write(path, 1)

    def killed(*_: object) -> None:
        os._exit(0)

    child = os.fork()
    if not child:
        monkeypatch.setattr(Manifest, "to_json", killed)
        write(path, 2)
    os.waitpid(child, 0)
    with lock(path):
        pass
    assert version(path) == 1
    assert sorted(os.listdir(tmp_path)) == ["x.json", "x.safetensors"]

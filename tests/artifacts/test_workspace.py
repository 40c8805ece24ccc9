from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dqtool.artifacts import Workspace
from dqtool.errors import EnvironmentFault

A, B = {"w": torch.arange(3.0)}, {"w": torch.ones(2), "scale": torch.zeros(4)}


def test_keeps_pieces_across_runs_in_order(tmp_path: Path):
    output = tmp_path / "x.safetensors"
    first = Workspace(output, "f")
    assert first.keys() == [] and list(tmp_path.iterdir()) == []
    first.save("up_blocks.0/attn", A)
    first.save("..", B)
    again = Workspace(output, "f")
    assert again.keys() == ["up_blocks.0/attn", ".."]
    loaded = again.load("..")
    assert loaded is not None and set(loaded) == {"w", "scale"} and torch.equal(loaded["w"], B["w"])
    assert again.load("other") is None
    again.save("..", A)
    assert set(Workspace(output, "f").load("..") or {}) == {"w"}
    again.clear()
    again.clear()
    assert list(tmp_path.iterdir()) == [] and again.keys() == []


def test_what_earlier_runs_spent_counts_up_to_their_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0, 10.0]
    monkeypatch.setattr("dqtool.artifacts.workspace.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("dqtool.artifacts.workspace.time.process_time", lambda: now[1])
    first = Workspace(tmp_path / "x", "f")
    now[:] = [105.0, 12.0]
    first.restart_clock()
    now[:] = [115.0, 20.0]
    first.save("a", A)
    now[:] = [200.0, 90.0]  # lost with the interrupt
    assert first.spent() == (95.0, 78.0)

    again = Workspace(tmp_path / "x", "f")
    now[:] = [201.0, 90.5]
    assert again.spent() == (11.0, 8.5)
    again.save("b", B)
    assert Workspace(tmp_path / "x", "f").spent() == (11.0, 8.5)
    assert Workspace(tmp_path / "x", "g").spent() == (0.0, 0.0)


def test_what_comes_before_the_clock_counts_as_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr("dqtool.artifacts.workspace.time.perf_counter", lambda: now[0])
    first = Workspace(tmp_path / "x", "f")
    first.stop_clock()
    now[0] = 130.0
    first.save("measured", A)
    again = Workspace(tmp_path / "x", "f")
    assert again.earlier_seconds() == 30.0
    again.stop_clock()
    assert again.spent()[0] == 0.0
    again.restart_clock()
    now[0] = 135.0
    assert again.spent()[0] == 5.0
    again.save("trained", B)
    third = Workspace(tmp_path / "x", "f")
    third.stop_clock()
    assert (third.earlier_seconds(), third.spent()[0]) == (35.0, 5.0)


def test_peaks_are_the_largest_of_all_runs(tmp_path: Path):
    first = Workspace(tmp_path / "x", "f")
    first.restart_clock(lambda: {"bytes": 7, "more": 1})
    first.save("a", A)
    again = Workspace(tmp_path / "x", "f")
    assert again.peaks() == {"bytes": 7, "more": 1}
    again.restart_clock(lambda: {"bytes": 5, "more": 3})
    assert again.peaks() == {"bytes": 7, "more": 3}
    assert Workspace(tmp_path / "x", "g").peaks() == {}


def test_of_another_fingerprint_is_discarded(tmp_path: Path):
    Workspace(tmp_path / "x", "f").save("a", A)
    assert Workspace(tmp_path / "x", "g").keys() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"fingerprint": "f", "pieces": {"a": 1}}'])
def test_with_a_damaged_index_is_discarded(tmp_path: Path, content: str):
    space = Workspace(tmp_path / "x", "f")
    space.save("a", A)
    (space.directory / "index.json").write_text(content)
    assert Workspace(tmp_path / "x", "f").keys() == []


def test_a_damaged_or_missing_piece_is_none_and_can_be_saved_again(tmp_path: Path):
    space = Workspace(tmp_path / "x", "f")
    space.save("a", A)
    file = space.directory / "a.tensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert Workspace(tmp_path / "x", "f").load("a") is None
    file.unlink()
    assert Workspace(tmp_path / "x", "f").load("a") is None
    space.save("a", A)
    assert space.load("a") is not None


def test_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    space = Workspace(tmp_path / "x", "f")
    space.save("a", A)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(EnvironmentFault, match="disk is full"):
        patch.setattr(os, "fsync", full)
        space.save("b", B)
    again = Workspace(tmp_path / "x", "f")
    assert again.keys() == ["a"] and again.load("a") is not None

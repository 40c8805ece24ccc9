"""Deferred tensors: one in memory at a time, and the file that the library would write."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from dqtool.artifacts import DeferredTensors, sha256_file
from dqtool.artifacts.hashed_file import HashedFile
from dqtool.artifacts.tensorfile import save_tensors


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "z": torch.randn(3, 5),
        "a.weight": torch.randn(4, 2, 3, 3),
        "codes": torch.arange(7, dtype=torch.uint8),
        "rows": torch.arange(3),
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(1.5),
        "nothing": torch.empty(0, 4),
        "view": torch.randn(6, 6).t(),
    }


def test_the_file_is_the_one_of_the_library(tmp_path: Path) -> None:
    plain, deferred = tensors(), DeferredTensors(tensors())
    for name in ("a.weight", "half", "view"):
        deferred.defer(name, plain[name], lambda name=name: plain[name].clone())
    assert save_tensors(tmp_path / "plain", plain) is None
    digest = save_tensors(tmp_path / "deferred", deferred)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "deferred").read_bytes()
    assert digest == sha256_file(tmp_path / "plain")


def test_rows_are_made_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashedFile, "PIECE", 100)
    plain, deferred, asked = tensors(), DeferredTensors(tensors()), []

    def rows(part: slice) -> torch.Tensor:
        asked.append(part)
        return plain["a.weight"][part].clone()

    deferred.defer("a.weight", plain["a.weight"], plain["a.weight"].clone, rows)
    save_tensors(tmp_path / "plain", plain)
    save_tensors(tmp_path / "deferred", deferred)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "deferred").read_bytes()
    assert [part.start for part in asked] == [0, 1, 2, 3]


def test_it_is_a_mapping_that_can_be_changed() -> None:
    plain, deferred = tensors(), DeferredTensors(tensors())
    deferred.defer("z", plain["z"], lambda: plain["z"] * 2)
    assert set(deferred) == set(plain)
    assert len(deferred) == len(plain)
    assert torch.equal(deferred["z"], plain["z"] * 2)
    deferred["z"] = plain["z"]
    assert torch.equal(deferred["z"], plain["z"])
    deferred.defer("z", plain["z"], lambda: plain["z"])
    del deferred["z"], deferred["rows"]
    assert "z" not in deferred
    assert "rows" not in deferred


def test_few_are_in_memory_at_once(tmp_path: Path) -> None:
    alive = most = 0

    class Counted:
        def __init__(self) -> None:
            nonlocal alive, most
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def make() -> torch.Tensor:
        tensor = torch.zeros(1000)
        tensor.owner = Counted()  # type: ignore[attr-defined]
        return tensor

    deferred = DeferredTensors({})
    for number in range(20):
        deferred.defer(f"t{number}", torch.empty(1000, device="meta"), make)
    save_tensors(tmp_path / "file", deferred)
    gc.collect()
    assert most <= 3


def test_a_function_that_breaks_its_word_is_found_out(tmp_path: Path) -> None:
    deferred = DeferredTensors({})
    deferred.defer("x", torch.empty(4), lambda: torch.zeros(5))
    with pytest.raises(ValueError, match="x"):
        save_tensors(tmp_path / "file", deferred)
    deferred.defer("x", torch.empty(4), lambda: torch.zeros(4), lambda part: torch.zeros(4)[part][:3])
    with pytest.raises(ValueError, match="x"):
        save_tensors(tmp_path / "file", deferred)

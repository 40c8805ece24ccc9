"""A file written once through: its bytes, its digest, and faults that come from another thread."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from dqtool.artifacts import hashed_file
from dqtool.artifacts.files import content_digest
from dqtool.artifacts.hashed_file import HashedFile


def test_bytes_and_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HashedFile, "PIECE", 1000)
    monkeypatch.setattr(HashedFile, "CALL", 70)
    monkeypatch.setattr(HashedFile, "FLUSHED", 2500)
    parts = [os.urandom(size) for size in (8, 0, 999, 1000, 1001, 12_345)]
    with HashedFile(tmp_path / "file") as file:
        for part in parts:
            file.write(part)
        digest = file.finish()
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert digest == hashlib.sha256(b"".join(parts)).hexdigest()


def test_a_full_disk_is_told_to_whoever_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flush(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hashed_file, "_flush", flush)
    monkeypatch.setattr(HashedFile, "FLUSHED", 10)
    with pytest.raises(OSError, match="No space left"), HashedFile(tmp_path / "file") as file:
        file.write(bytes(100))
        file.finish()


def test_a_large_file_is_told_by_the_digests_of_its_pieces(tmp_path: Path) -> None:
    data = os.urandom(2500)
    (tmp_path / "file").write_bytes(data)
    pieces = [hashlib.sha256(data[start : start + 1000]).digest() for start in (0, 1000, 2000)]
    assert content_digest(tmp_path / "file", 1000) == hashlib.sha256(b"".join(pieces)).hexdigest()
    assert content_digest(tmp_path / "file", 2500) == hashlib.sha256(data).hexdigest()

"""Large files are hashed once, and again as soon as anybody has written to them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from dqtool.artifacts import verified

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files are remembered where they have inodes")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """The files that are hashed, in order; any size is large, and a file has settled at once."""
    seen: list[Path] = []
    digest = verified.sha256_file

    def spy(path: Path) -> str:
        seen.append(path)
        return digest(path)

    monkeypatch.setattr(verified, "sha256_file", spy)
    monkeypatch.setattr(verified, "SMALLEST", 1)
    monkeypatch.setattr(verified, "SETTLED", -1.0)
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    return seen


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[Path]) -> None:
    digest = written(tmp_path / "file", b"weights")
    assert verified.has_digest(tmp_path / "file", digest)
    assert verified.has_digest(tmp_path / "file", digest)
    assert len(hashed) == 1
    assert not verified.has_digest(tmp_path / "file", "0" * 64)  # another manifest's
    assert len(hashed) == 2


@pytest.mark.parametrize("keep_times", [False, True])
def test_a_changed_file_is_hashed_again(tmp_path: Path, hashed: list[Path], keep_times: bool) -> None:
    path = tmp_path / "file"
    digest = written(path, b"weights")
    assert verified.has_digest(path, digest)
    before = path.stat()
    time.sleep(0.05)  # past the resolution of the file system's clock
    with path.open("r+b") as stream:
        stream.write(b"W")
    if keep_times:  # rsync and touch set these times, but can't set the time of change
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not verified.has_digest(path, digest)
    assert len(hashed) == 2


def test_another_file_of_the_same_name_is_hashed(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "file"
    digest = written(path, b"weights")
    assert verified.has_digest(path, digest)
    written(tmp_path / "new", b"Weights")
    os.replace(tmp_path / "new", path)
    assert not verified.has_digest(path, digest)


def test_what_was_written_just_now_and_what_is_small_is_not_remembered(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    digest = written(path, b"weights")
    monkeypatch.setattr(verified, "SETTLED", 60.0)
    assert verified.has_digest(path, digest)
    monkeypatch.setattr(verified, "SETTLED", -1.0)
    monkeypatch.setattr(verified, "SMALLEST", 1 << 20)
    assert verified.has_digest(path, digest)
    assert len(hashed) == 2
    assert not (tmp_path / "cache").exists()


def test_a_damaged_note_or_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "file"
    digest = written(path, b"weights")
    assert verified.has_digest(path, digest)
    (note,) = (tmp_path / "cache" / "verified").iterdir()
    assert json.loads(note.read_text())["sha256"] == digest
    note.write_text("{")
    assert verified.has_digest(path, digest)
    note.unlink()
    note.parent.rmdir()
    note.parent.write_text("a file stands in the way")
    assert verified.has_digest(path, digest)
    assert len(hashed) == 3

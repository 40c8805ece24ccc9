"""One place decides where the cache is, and a cache that can't be written is no error."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from dqtool.artifacts import Artifact, Manifest, cache_directory, keep_in_cache
from dqtool.errors import EnvironmentFault, NumericError


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without a home directory, as in containers with an arbitrary user id."""

    def home() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DQTOOL_CACHE")
    monkeypatch.setattr(Path, "home", home)


def test_the_variable_wins_over_the_home_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    assert cache_directory("images") == tmp_path / "cache" / "images"
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    for value in ("", None):
        monkeypatch.setenv("DQTOOL_CACHE", value) if value is not None else monkeypatch.delenv("DQTOOL_CACHE")
        assert cache_directory("images") == tmp_path / ".cache" / "dqtool" / "images"


@pytest.mark.usefixtures("homeless")
def test_without_a_home_the_message_names_the_variable() -> None:
    with pytest.raises(EnvironmentFault, match="DQTOOL_CACHE"):
        cache_directory("images")


@pytest.mark.usefixtures("homeless")
def test_what_is_merely_cached_works_without_a_home(tmp_path: Path) -> None:
    import torch

    from dqtool.artifacts.names import path_within
    from dqtool.artifacts.verified import has_digest
    from dqtool.models.sampling.image_cache import cached_images
    from dqtool.runtimes.choice import recalled_timings, remember_timings

    artifact = Artifact(tmp_path, "e", Manifest(stage="export", fingerprint="0" * 64, files={}))
    assert recalled_timings(artifact) == {}
    assert not remember_timings(artifact, {1: {"cpu": 1.0, "simulate": 2.0}})
    assert cached_images({"seed": 0}, lambda: torch.ones(1)).item() == 1
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert path_within(tmp_path, "link", "here", links=tmp_path) == tmp_path / "link"
    assert not has_digest(tmp_path / "file", "0" * 64)


def test_a_file_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert keep_in_cache(path, lambda new: new.write_text("first")) is None

    def fail(new: Path) -> None:
        new.write_text("half")
        raise OSError(28, "No space left on device")

    assert keep_in_cache(path, fail) == "No space left on device"
    assert path.read_text() == "first"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]

    def interrupted(new: Path) -> None:
        new.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        keep_in_cache(path, interrupted)
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]

    def refuse(_new: Path) -> None:
        raise NumericError("a value is NaN")

    assert keep_in_cache(path, refuse) == "a value is NaN"
    assert keep_in_cache(Path("/proc/nowhere/file"), lambda new: new.write_text("")) is not None


def test_the_files_of_a_kept_directory_are_replaced(tmp_path: Path) -> None:
    for content in ("first", "second"):

        def write(new: Path, content: str = content) -> None:
            new.mkdir()
            (new / "graph").write_text(content)

        assert keep_in_cache(tmp_path / "folder", write, directory=True) is None
        assert (tmp_path / "folder" / "graph").read_text() == content
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]

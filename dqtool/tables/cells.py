"""Finished cells: one small JSON each, so that results can be committed and no cell is ever run twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts.files import os_fault, write_text
from dqtool.errors import ArtifactError

__all__ = ["FORMAT", "CellStore", "claim"]

FORMAT = "dqtool-cell/1"


@dataclass(frozen=True)
class CellStore:
    """The folder of finished cells. One that records `measures` older than these is there, but not finished."""

    folder: Path
    measures: int = 0

    def finished(self, key: str) -> bool:
        """Whether a cell is there with the figures it should have; raises as `load` does."""
        found = self.load(key)
        return found is not None and int(found.get("measures", 0)) >= self.measures

    def path(self, key: str) -> Path:
        """Where a cell is, or would be."""
        return self.folder / f"{key[:32]}.json"

    def load(self, key: str) -> dict[str, Any] | None:
        """A finished cell; None when it isn't.

        Raises:
            ArtifactError: the file is no cell, or another's.
        """
        path = self.path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise os_fault(error, path) from error
        try:
            found = json.loads(text)
            if found["format"] == FORMAT and found["key"] == key:
                return dict(found)
        except (ValueError, KeyError, TypeError):
            pass
        raise ArtifactError("This is not the cell it should be", where=str(path), fix="Remove it; it is made again")

    def save(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a finished cell; whoever looks finds all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "key": key, **record}, indent=1, sort_keys=True, allow_nan=False)
        write_text(self.path(key), text + "\n")

    def every(self) -> Iterator[dict[str, Any]]:
        """All finished cells."""
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(ValueError, OSError):
                found = json.loads(path.read_text(encoding="utf-8"))
                if isinstance(found, dict) and found.get("format") == FORMAT:
                    yield found


@contextlib.contextmanager
def claim(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock `path`, which dies with its holder; whether it was got. `wait`: until it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)

"""Finished cells: one small JSON file each, so that results can be committed and no cell is run twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts.files import write_text
from dqtool.artifacts.reading import MANIFEST_BYTES, parse_json, read_file
from dqtool.errors import ArtifactError, DqtoolError

__all__ = ["FORMAT", "CellStore", "claim"]

FORMAT = "dqtool-cell/1"


@dataclass(frozen=True)
class CellStore:
    """Folder of finished cells. A cell whose recorded `measures` is older than this one does not count as finished."""

    folder: Path
    measures: int = 0

    def finished(self, key: str) -> bool:
        """Return True if a cell exists with all figures it should have. Raises the errors of `load`."""
        found = self.load(key)
        return found is not None and int(found.get("measures", 0)) >= self.measures

    def path(self, key: str) -> Path:
        """Return the path of a cell, which need not exist."""
        return self.folder / f"{key[:32]}.json"

    def load(self, key: str) -> dict[str, Any] | None:
        """Return the record of a cell; None if there is none.

        Raises:
            ArtifactError: the file is not a cell, or belongs to another key.
        """
        path = self.path(key)
        try:
            text = read_file(path, MANIFEST_BYTES)
        except DqtoolError:
            if not path.exists():
                return None
            raise
        try:
            found = parse_json(text)
            if found["format"] == FORMAT and found["key"] == key:
                return dict(found)
        except (ValueError, KeyError, TypeError):
            pass
        raise ArtifactError(
            "This file is not the cell that its name stands for",
            where=str(path),
            fix="Remove it; the cell is run again",
        )

    def save(self, key: str, record: Mapping[str, Any]) -> None:
        """Write a finished cell atomically: readers see the whole file or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, "key": key, **record}, indent=1, sort_keys=True, allow_nan=False)
        write_text(self.path(key), text + "\n")

    def every(self) -> Iterator[dict[str, Any]]:
        """Yield the records of all cells; files that are none are skipped."""
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(ValueError, DqtoolError):
                found = parse_json(read_file(path, MANIFEST_BYTES))
                if isinstance(found, dict) and found.get("format") == FORMAT:
                    yield found


@contextlib.contextmanager
def claim(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path`, and yield True if it was free. With `wait`, wait until it is.

    The system releases the lock when its holder ends.
    """
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

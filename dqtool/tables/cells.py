"""Finished cells: one small JSON file each, so that results can be committed and no cell is run twice."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqtool.artifacts.files import write_text
from dqtool.artifacts.reading import MANIFEST_BYTES, parse_json, read_file
from dqtool.artifacts.records import EnvironmentRecord
from dqtool.artifacts.schema import Record, record
from dqtool.errors import ArtifactError, DqtoolError

__all__ = ["FORMAT", "CellRecord", "CellStore", "StageRun", "claim"]

FORMAT = "dqtool-cell/1"


@dataclass(frozen=True)
class StageRun(Record):
    """One stage of a finished cell.

    Attributes:
        parameters: all parameters that decide the artifact.
        key: name of the artifact among all artifacts of tables.
        cpu_seconds: processor seconds that the stage took; None if its artifact existed already.
    """

    stage: str
    parameters: dict[str, Any]
    key: str = ""
    cpu_seconds: float | None = None


@dataclass(frozen=True)
class CellRecord(Record):
    """A finished cell. Other keys of its file (`provenance.provenance`) are kept in `as_read`.

    Attributes:
        model: the model that the cell quantizes.
        measures: version of the figures that the cell holds.
        metrics: figures by stage, and `errors`; None if the computation failed.
        failed: message of the error that ended the computation.
        seconds: wall-clock seconds of the run.
    """

    stages: list[StageRun]
    model: str = ""
    environment: EnvironmentRecord = field(default_factory=EnvironmentRecord)
    dqtool: str = ""
    measures: int = 0
    metrics: dict[str, Any] | None = None
    failed: str | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class CellStore:
    """Folder of finished cells. A cell whose recorded `measures` is older than this one does not count as finished."""

    folder: Path
    measures: int = 0

    def finished(self, key: str) -> bool:
        """Return True if a cell exists with all figures it should have. Raises the errors of `load`."""
        found = self.load(key)
        return found is not None and found.measures >= self.measures

    def path(self, key: str) -> Path:
        """Return the path of a cell, which need not exist."""
        return self.folder / f"{key[:32]}.json"

    def load(self, key: str) -> CellRecord | None:
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
                return record(found, CellRecord)
        except (ValueError, KeyError, TypeError):
            pass
        raise ArtifactError(
            "This file is not the cell that its name stands for",
            where=str(path),
            fix="Remove it; the cell is run again",
        )

    def save(self, key: str, cell: CellRecord) -> None:
        """Write a finished cell atomically: readers see the whole file or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {**cell.to_json(), "format": FORMAT, "key": key}
        text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
        write_text(self.path(key), text + "\n")

    def every(self) -> Iterator[CellRecord]:
        """Yield the records of all cells; files that are none are skipped."""
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(ValueError, DqtoolError):
                found = parse_json(read_file(path, MANIFEST_BYTES))
                if isinstance(found, dict) and found.get("format") == FORMAT:
                    yield record(found, CellRecord)


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

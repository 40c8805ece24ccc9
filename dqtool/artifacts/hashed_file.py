"""Writing a large file once through: its bytes are hashed and brought to the disk while later ones are still being made."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

__all__ = ["HashedFile"]

_flush = getattr(os, "fdatasync", os.fsync)


class HashedFile:
    """A new file at `path`, within a `with`. Writing, hashing and flushing each have a thread of their own, so that the
    flush at the end finds little left to do. Raises `OSError` from any method.
    """

    PIECE: ClassVar[int] = 4 << 20
    """Bytes that are handed on at once: few enough to be in a core's cache still when they are hashed."""
    CALL: ClassVar[int] = 512 << 10
    """Bytes to a system call. For one of a mebibyte and more Linux takes its page cache in blocks so large that a virtual
    machine often has to ask its host for them, which takes several times the kernel time."""
    WAITING: ClassVar[int] = 8
    """Pieces in memory that are not yet written and hashed."""
    FLUSHED: ClassVar[int] = 256 << 20
    """Bytes after which what is written so far is sent to the disk."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115  (closed by __exit__)
        self._digest = hashlib.sha256()
        self._writer, self._hasher, self._flusher = (ThreadPoolExecutor(1) for _ in range(3))
        self._pending: deque[Future[Any]] = deque()
        self._flushes: list[Future[Any]] = []
        self._unflushed = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append `data`, which must not change until the file is finished."""
        view = memoryview(data)
        for start in range(0, len(view), self.PIECE):
            piece = view[start : start + self.PIECE]
            while len(self._pending) >= 2 * self.WAITING:
                self._pending.popleft().result()
            self._pending.append(self._writer.submit(self._append, piece))
            self._pending.append(self._hasher.submit(self._digest.update, piece))

    def finish(self) -> str:
        """Wait until everything is written; returns the file's SHA-256 as a hex digest."""
        for task in self._pending:
            task.result()
        for task in self._flushes:  # all there are, now that all is written
            task.result()
        return self._digest.hexdigest()

    def _append(self, data: memoryview) -> None:
        while data:
            written = self._file.write(data[: self.CALL])
            data = data[written:]
            self._unflushed += written
        if self._unflushed >= self.FLUSHED and all(flush.done() for flush in self._flushes):
            self._unflushed = 0
            self._flushes.append(self._flusher.submit(_flush, self._file.fileno()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        for pool in (self._writer, self._hasher, self._flusher):
            pool.shutdown(cancel_futures=True)
        self._file.close()

"""Large files that were found to be what their manifest says are not hashed again until they change.

As git and build tools do it: what the system says of a file (device, inode, size, times of change) is kept with the digest
that was computed, under `$DQTOOL_CACHE` (default `~/.cache/dqtool`). Every write changes these times, so that only a file
that nobody wrote to is taken on trust. A file changed within the last seconds is hashed each time: a second change within
the clock's resolution would not be seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from dqtool.artifacts.cache import cache_directory
from dqtool.artifacts.files import os_fault, sha256_file, write_text
from dqtool.artifacts.reading import load_json
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["has_digest"]

SMALLEST = 16 << 20
"""Bytes from which on a file is remembered: hashing a smaller one takes a hundredth of a second."""

SETTLED = 5.0
"""Seconds that a file must have been left alone for."""


def has_digest(path: str | os.PathLike[str], sha256: str) -> bool:
    """Return whether the file's bytes have this SHA-256 (a hex digest).

    Raises:
        EnvironmentFault: the file can't be read.
    """
    try:
        before = os.stat(path)
    except OSError as error:
        raise os_fault(error, path) from error
    # Elsewhere `st_ctime` is the time of creation, or there are no inodes.
    if before.st_size < SMALLEST or os.name != "posix":
        return sha256_file(path) == sha256
    quiet = time.time() - max(before.st_mtime, before.st_ctime) > SETTLED  # before hashing, which may take longer
    try:
        seen, note = _identity(before), _note(path)
    except EnvironmentFault:  # there is no cache
        return sha256_file(path) == sha256
    with contextlib.suppress(OSError, DqtoolError):
        if load_json(note) == {**seen, "sha256": sha256} and os.access(path, os.R_OK):
            return True
    if sha256_file(path) != sha256:
        return False
    with contextlib.suppress(OSError, DqtoolError):  # no cache, no harm
        if quiet and _identity(os.stat(path)) == seen:
            note.parent.mkdir(parents=True, exist_ok=True)
            write_text(note, json.dumps({**seen, "sha256": sha256}))
    return True


def _identity(status: os.stat_result) -> dict[str, int]:
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "changed_ns": status.st_ctime_ns,
    }


def _note(path: str | os.PathLike[str]) -> Path:
    return cache_directory("verified") / f"{hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:32]}.json"

"""Paths that the user of this machine named on a command line, or that dqtool wrote for them.

An artifact records the places of its model and conditions, so that later stages find them. It may come from a stranger, who
could name any file there. A recorded path is therefore read only if it lies beside the artifact, or the user named it
before. `$DQTOOL_CACHE/named` (default `~/.cache/dqtool/named`) holds one empty file for each such path. Imports no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from dqtool.artifacts.cache import cache_directory
from dqtool.errors import DqtoolError

__all__ = ["may_read", "remember_named"]


def remember_named(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Note paths, Hub ids and the like that the user named. Without a place to write nothing is kept."""
    with contextlib.suppress(OSError, ValueError, DqtoolError):
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            note = folder / _key(path)
            if not note.exists():
                note.touch()


def may_read(path: str | os.PathLike[str], beside: Iterable[str | os.PathLike[str]]) -> bool:
    """Return whether a path that a file records may be read: it was named before, lies in the directory of one of the
    files `beside`, or is an embedded model."""
    if os.fspath(path).startswith("zoo:"):
        return True
    try:
        real = Path(os.path.realpath(path))
        if any(real.is_relative_to(os.path.realpath(os.path.dirname(os.path.abspath(each)))) for each in beside):
            return os.path.lexists(path)
        return (_folder() / _key(path)).exists()
    except (OSError, ValueError, DqtoolError):
        return False


def _folder() -> Path:
    return cache_directory("named")


def _key(path: str | os.PathLike[str]) -> str:
    """Return the name of a path's note. What is no path of this machine, such as a Hub id, counts by its text."""
    text = os.path.realpath(path) if os.path.lexists(path) else os.fspath(path)
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:32]

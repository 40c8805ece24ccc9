"""The user's cache: `$DQTOOL_CACHE`, by default `~/.cache/dqtool`. Everything in it can be made again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["cache_directory", "keep_in_cache"]


def cache_directory(name: str) -> Path:
    """Return the folder `name` of the cache. It need not exist.

    Raises:
        EnvironmentFault: `$DQTOOL_CACHE` is not set and the user has no home directory.
    """
    root = os.environ.get("DQTOOL_CACHE")
    if root:
        return Path(root) / name
    try:
        return Path.home() / ".cache" / "dqtool" / name
    except RuntimeError as error:
        raise EnvironmentFault(
            "There is no home directory to keep a cache in",
            fix="Set the environment variable DQTOOL_CACHE to a directory",
        ) from error


def keep_in_cache(path: Path, write: Callable[[Path], object], *, directory: bool = False) -> str | None:
    """Let `write` fill a temporary name beside `path` and move it there whole. With `directory`, the files of an existing
    directory are replaced one by one.

    Returns:
        None if it was kept, else the reason: a cache that can't be written is no error.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        if directory and path.exists():
            for entry in partial.iterdir():
                os.replace(entry, path / entry.name)
        else:
            os.replace(partial, path)
    except OSError as error:
        return error.strerror or str(error)
    except DqtoolError as error:
        return error.what
    finally:
        _remove(partial)
    return None


def _remove(partial: Path) -> None:
    try:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
    except OSError:  # its directory may be unreadable
        return

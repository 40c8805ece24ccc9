"""One writer per output: an advisory lock that dies with its holder.

The lock is `flock`, as that of filelock is. It is written here because its file names the holder's process for the error message,
and because the holder removes the file, so that no lock files remain beside outputs.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dqtool.artifacts.files import has_leftovers, os_fault, partial_of, sweep, target_of
from dqtool.errors import EnvironmentFault

__all__ = ["clear_leftovers", "lock", "remove_pieces"]


@contextlib.contextmanager
def lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock on the output `path` (`.NAME.lock` beside it) and clear what killed writers left there.

    Never waits: raises `EnvironmentFault` that names the holder's process when the lock is held, or when the
    directory is missing or not writable.
    """
    target = target_of(path)
    file = target.with_name(f".{target.name}.lock")
    try:
        descriptor = _acquire(file, os.fspath(path))
    except OSError as error:
        raise os_fault(error, file.parent) from error
    try:
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise os_fault(error, file) from error
        sweep(target)
        yield
    finally:
        # Removed while still held: who opened the file before that gets the lock of a file that is gone, and notices.
        with contextlib.suppress(OSError):
            file.unlink()
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked worker may still have the descriptor open
        os.close(descriptor)


def clear_leftovers(path: str | os.PathLike[str]) -> None:
    """Remove what killed writers of the finished output `path` left beside it, their finished pieces included. Does nothing
    while somebody else writes there, or where the place can't be written to."""
    target = target_of(path)
    if has_leftovers(target):
        with contextlib.suppress(EnvironmentFault, OSError), lock(path):
            remove_pieces(path)


def remove_pieces(path: str | os.PathLike[str]) -> None:
    """Remove the finished pieces of the output `path`, which stands now. Only the holder of the lock on `path` may."""
    shutil.rmtree(partial_of(target_of(path)), ignore_errors=True)


def _acquire(file: Path, given: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still_there(descriptor, file):
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            os.close(descriptor)
            raise EnvironmentFault(
                f"Another dqtool is writing this output (process {holder})" if holder else "This output is locked",
                where=given,
                fix="Wait until it has finished, or write elsewhere with -o",
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_still_there(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False

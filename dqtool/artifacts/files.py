"""File system operations of every writer: durable writes, staging beside the target, errors in plain words."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import mmap
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dqtool.artifacts.faults import os_fault
from dqtool.artifacts.reading import check_regular, open_regular, read_text_file
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = [
    "content_digest",
    "digest_of_files",
    "fsync_path",
    "has_leftovers",
    "is_interrupted",
    "os_fault",
    "partial_of",
    "sha256_file",
    "staging",
    "swap_in",
    "target_of",
    "whole_file",
    "write_text",
]

_MOVES = "moves"
"""File in a staging directory that lists the moves of `swap_in`, from when everything to be moved is whole."""


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Return the hex digest of a file's bytes.

    Raises:
        ArtifactError: it is no ordinary file.
        EnvironmentFault: it can't be read.
    """
    try:
        with open_regular(path) as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise os_fault(error, path) from error


def content_digest(path: str | os.PathLike[str], piece: int = 256 << 20) -> str:
    """Return a hex digest of a file's content: its SHA-256, or past `piece` bytes that of its pieces' digests, which are
    computed side by side. Raises as `sha256_file`."""
    try:
        size = check_regular(path).st_size
        if size <= piece:
            return sha256_file(path)

        def digest(start: int) -> bytes:
            # Mapped: a call for each piece, so that Python's lock is asked for but once, and no copy.
            return hashlib.sha256(view[start : start + piece]).digest()

        with (
            open(path, "rb") as stream,
            mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            return hashlib.sha256(b"".join(pool.map(digest, range(0, size, piece)))).hexdigest()
    except OSError as error:
        raise os_fault(error, path) from error


def digest_of_files(files: Iterable[tuple[str, str | os.PathLike[str]]]) -> str:
    """Return a hex digest of the names and contents of (name, path), in this order. Raises as `sha256_file`."""
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(f"{name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def target_of(path: str | os.PathLike[str]) -> Path:
    """Return `path` as a place that can be written to.

    Raises:
        EnvironmentFault: it is `.`, `..` or `/`, which can't be replaced; a symbolic link, which would be; or something else
            than a file or directory, such as a device.
    """
    target = Path(path)
    if target.name in ("", ".."):
        raise EnvironmentFault(
            "This directory can not be replaced", where=os.fspath(path), fix="Name a new directory or file with -o"
        )
    if "\0" in os.fspath(target):
        raise EnvironmentFault("A path can not hold a NUL character", where=ascii(target), fix="Check the path")
    try:
        mode = target.lstat().st_mode
    except OSError:  # nothing is there, or its parent says more when it is looked at
        return target
    if stat.S_ISLNK(mode):
        raise EnvironmentFault(
            "This output is a symbolic link, and dqtool does not replace links",
            where=os.fspath(path),
            fix=f"Give the file that it leads to, {os.path.realpath(target)}, or another name",
        )
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise EnvironmentFault(
            "This is no ordinary file: a device, a pipe or a socket can not be an output",
            where=os.fspath(path),
            fix="Name another file with -o",
        )
    return target


def fsync_path(path: Path) -> None:
    """Flush a file's data, or a directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that `path` is at every moment either the old file or the whole new one.

    Raises `EnvironmentFault`; the old file then still stands.
    """
    with whole_file(path) as new:
        new.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Provide a new file to write, which takes the place of `path` when the block ends without an error.

    Raises:
        EnvironmentFault: it can't be written. The old file then still stands.
    """
    try:
        with staging(path) as area:
            new = area / f"new{path.suffix}"
            yield new
            fsync_path(new)
            os.replace(new, path)
            fsync_path(path.parent)
    except OSError as error:
        raise os_fault(error, path) from error


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """Provide a private directory beside `path`, hence on the same file system, and remove it when the block is left.

    All temporary files live in it, those of other libraries too. A killed process therefore leaves one name pattern
    behind, which the next writer of `path` removes here, and `sweep` under the lock.
    """
    _sweep_dead(path)
    area = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    if area.exists():  # left by a dead process that had the same number
        shutil.rmtree(area)
    try:
        area.mkdir()
        yield area
    finally:
        shutil.rmtree(area, ignore_errors=True)


def sweep(path: Path) -> None:
    """Remove the temporary files that killed writers of `path` left beside it, after finishing the moves of one that was
    killed between them. Only the holder of the lock on `path` may."""
    for _, stale in _staging_areas(path):
        _clear(stale)


def _sweep_dead(path: Path) -> None:
    """Remove the temporary files of writers of `path` that are no processes of this machine any more. Needs no lock."""
    for process, stale in _staging_areas(path):
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            _clear(stale)
        except OSError:  # it lives, and is somebody else's
            continue


def _staging_areas(path: Path) -> list[tuple[int, Path]]:
    """Return the staging directories of `path` with the numbers of their processes. `NAME.onnx`'s are none of `NAME`'s."""
    before = f".{path.name}."
    found = path.parent.glob(f"{glob.escape(before)}*.tmp")
    named = ((area.name.removeprefix(before).removesuffix(".tmp"), area) for area in found)
    return [(int(number), area) for number, area in named if number.isascii() and number.isdigit()]


def _clear(area: Path) -> None:
    """Remove a staging directory. If `swap_in` had begun its moves, everything new is whole: they are made first."""
    with contextlib.suppress(OSError, ValueError, DqtoolError):
        lines = read_text_file(area / _MOVES, 1 << 20).splitlines()
        for number, (new, target) in enumerate(line.split("/") for line in lines):
            if os.path.lexists(area / new):
                if os.path.lexists(area.parent / target):
                    os.rename(area.parent / target, area / f"replaced-{number}")
                os.replace(area / new, area.parent / target)
    shutil.rmtree(area, ignore_errors=True)


def is_interrupted(path: Path) -> bool:
    """Return whether a writer of `path` was killed, or is at work, while it moved new files into place."""
    return any((area / _MOVES).is_file() for _, area in _staging_areas(path))


def partial_of(target: Path) -> Path:
    """Return the directory beside `target` that keeps the finished pieces of an interrupted run."""
    return target.with_name(f".{target.name}.partial")


def has_leftovers(target: Path) -> bool:
    """Return whether a killed writer of `target` left anything beside it: a lock file, temporary files, finished pieces."""
    beside = (target.with_name(f".{target.name}.lock"), partial_of(target))
    return any(map(os.path.lexists, beside)) or bool(_staging_areas(target))


def swap_in(area: Path, moves: Sequence[tuple[Path, Path]]) -> None:
    """Move each (new, target) of `moves`, from `area` to beside it, into place in order; the last one makes the whole valid.

    The earlier targets are first set aside in the staging directory `area`, last one first, and are put back when
    anything interrupts before the last move. After a kill `sweep` makes the moves that are missing. How far it came is read off the file system, not off a variable, since
    an interrupt may fall between a rename and the note of it.
    """
    aside = [area / f"aside-{number}" for number in range(len(moves))]
    last_new = moves[-1][0]
    (area / _MOVES).write_text("".join(f"{new.name}/{target.name}\n" for new, target in moves), encoding="utf-8")
    try:
        for (_, target), old in reversed(list(zip(moves, aside, strict=True))):
            if os.path.lexists(target):
                os.rename(target, old)
        for new, target in moves:
            if new is last_new:
                fsync_path(target.parent)
            os.replace(new, target)
        fsync_path(moves[-1][1].parent)
    except BaseException:
        if os.path.lexists(last_new):
            for (new, target), old in zip(moves, aside, strict=True):
                if not os.path.lexists(new):
                    target.unlink(missing_ok=True)
                if os.path.lexists(old):
                    os.rename(old, target)
        raise

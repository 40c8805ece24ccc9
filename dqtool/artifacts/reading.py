"""Bounded reading of files that strangers may have made: no special files, no more bytes, values or depth than are honest.

Every reader of JSON, text, safetensors headers, pickles, archives and graphs opens its file through `open_regular` and
checks a bound before it allocates, so that whatever is refused costs at most a second and 200 MB over the file's size.
Imports no torch.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import stat
import struct
import zipfile
from typing import Any, NoReturn

from dqtool.artifacts.faults import os_fault
from dqtool.errors import ArtifactError, DqtoolError

__all__ = [
    "CONFIG_BYTES",
    "FILE_BYTES",
    "MANIFEST_BYTES",
    "TEXT_BYTES",
    "CountedReader",
    "check_archive",
    "check_regular",
    "json_object",
    "load_json",
    "open_regular",
    "parse_json",
    "read_file",
    "read_text_file",
]

CONFIG_BYTES = 4 << 20
"""Largest config, model index, scheduler config and card. The largest of diffusers' own are some ten kilobytes."""
MANIFEST_BYTES = 32 << 20
"""Largest manifest: a thousand layers with their metrics take about a megabyte."""
TEXT_BYTES = 64 << 20
"""Largest file of prompts: COCO's 414,113 captions take 42 MB as JSON."""
FILE_BYTES = 64 << 30
"""Largest file that travels with a model and is read whole: a text encoder, which may take ten gigabytes."""

_VALUES = 1_000_000
"""Most values in a JSON text, each of which takes up to 70 bytes of memory."""
_DEPTH = 64
_DIGITS = 20
"""Digits of the largest 64-bit integer."""
_ENTRIES = 100_000
"""Most members of a zip archive."""
_END_OF_ARCHIVE = b"PK\x05\x06"
_REGULAR = "Give an ordinary file: copy what a pipe or device brings into one first"


def check_regular(path: str | os.PathLike[str], fault: type[DqtoolError] = ArtifactError) -> os.stat_result:
    """Return the file's status, and never open it: a FIFO would wait for a writer, a device might never end.

    Raises:
        DqtoolError: `fault`, where the path is a directory, FIFO, socket or device, or no possible path.
        EnvironmentFault: nothing is there, or the system denies it.
    """
    where = os.fspath(path)
    try:
        status = os.stat(path)
    except OSError as error:
        raise os_fault(error, path) from error
    except ValueError as error:  # a NUL
        raise fault("This is no possible path: it holds a NUL character", where=where) from error
    _refuse_special(status, where, fault)
    return status


def open_regular(
    path: str | os.PathLike[str], limit: int | None = None, fault: type[DqtoolError] = ArtifactError
) -> io.BufferedReader:
    """Open an ordinary file of at most `limit` bytes for reading.

    Raises:
        DqtoolError: `fault`, where it is larger, or no ordinary file.
        EnvironmentFault: it is missing or can't be opened.
    """
    check_regular(path, fault)
    where = os.fspath(path)
    try:
        # Without waiting: it may have become a FIFO since.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise os_fault(error, path) from error
    stream = open(descriptor, "rb")  # noqa: SIM115  (the caller closes it)
    try:
        status = os.fstat(stream.fileno())
        _refuse_special(status, where, fault)
        if limit is not None and status.st_size > limit:
            raise fault(
                f"The file is too large for what it should be: {status.st_size:,} bytes, and at most {limit:,} are read",
                where=where,
            )
    except BaseException:
        stream.close()
        raise
    return stream


def read_file(path: str | os.PathLike[str], limit: int, fault: type[DqtoolError] = ArtifactError) -> bytes:
    """Return the bytes of an ordinary file of at most `limit`; raises as `open_regular`."""
    with open_regular(path, limit, fault) as stream:
        try:
            return stream.read(min(limit, os.fstat(stream.fileno()).st_size))
        except OSError as error:
            raise os_fault(error, path) from error


def read_text_file(path: str | os.PathLike[str], limit: int, fault: type[DqtoolError] = ArtifactError) -> str:
    """Return the UTF-8 text of an ordinary file, without a byte order mark; raises as `open_regular`."""
    content = read_file(path, limit, fault)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise fault("This file is not UTF-8 text", where=os.fspath(path)) from error


def parse_json(text: str | bytes, *, values: int = _VALUES, finite: bool = True, digits: int = _DIGITS) -> Any:
    """Return the value of a JSON text with at most `values` values, 64 levels and whole numbers of `digits` digits.

    Raises `ValueError` with the reason for anything else, and unless `finite` is off for NaN and infinities, which Python
    writes though JSON has no such numbers.
    """

    def short_int(number: str) -> int:
        if len(number) > digits:
            raise ValueError(f"a number of {len(number):,} digits is too large")
        return int(number)

    # Commas and brackets within texts are counted too, which only makes the bound a little stricter.
    if isinstance(text, bytes):
        marks = sum(map(text.count, (b",", b"[", b"{")))
    else:
        marks = sum(map(text.count, (",", "[", "{")))
    if marks > values:
        raise ValueError(f"it holds {marks:,} values, and at most {values:,} are read")
    try:
        if finite:
            value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite, parse_int=short_int)
        else:
            value = json.loads(text, parse_int=short_int)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {_DEPTH} levels") from error
    level, depth = [value], 0
    while level := [
        item
        for outer in level
        if isinstance(outer, (dict, list))
        for item in (outer.values() if isinstance(outer, dict) else outer)
    ]:
        depth += 1
        if depth > _DEPTH:
            raise ValueError(f"it is nested deeper than {_DEPTH} levels")
    return value


def load_json(path: str | os.PathLike[str], limit: int = CONFIG_BYTES, *, finite: bool = True) -> dict[str, Any]:
    """Return the JSON object in a file of at most `limit` bytes; `finite` as in `parse_json`.

    Raises:
        ArtifactError: it is no JSON object, or beyond the bounds of `parse_json`.
        EnvironmentFault: it is missing or can't be read.
    """
    return json_object(read_file(path, limit), os.fspath(path), limit=limit, finite=finite)


def json_object(
    text: bytes, where: str, *, limit: int = CONFIG_BYTES, finite: bool = True, digits: int = _DIGITS
) -> dict[str, Any]:
    """Return the JSON object that `text`, of at most `limit` bytes, stands for; `where` names its file for messages.

    Raises:
        ArtifactError: it is no JSON object, or beyond the bounds of `parse_json`.
    """
    try:
        if len(text) > limit:
            raise ValueError(f"it has {len(text):,} bytes, and at most {limit:,} are read")
        value = parse_json(text, finite=finite, digits=digits)
    except ValueError as error:
        raise ArtifactError(f"This is no valid JSON: {error}", where=where) from error
    if not isinstance(value, dict):
        raise ArtifactError("This is no JSON object", where=where)
    return value


def check_archive(stream: io.BufferedReader, *, packed: bool = False) -> list[zipfile.ZipInfo]:
    """Return the members of a zip archive, whose count and sizes are found honest before any is read.

    Without `packed` none may be compressed, as `torch.save` and `numpy.savez` write them, so that all of them together
    are no larger than the file.

    Raises:
        ValueError: it is no such archive.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(max(0, size - 65_557))  # the end record and the longest comment
    tail = stream.read(65_557)
    place = tail.rfind(_END_OF_ARCHIVE)
    if place < 0 or len(tail) < place + 22:
        raise ValueError("it is no zip archive")
    count, length = struct.unpack("<HI", tail[place + 10 : place + 16])
    # Large archives say both elsewhere, in the record before this one.
    locator = tail.rfind(b"PK\x06\x06", 0, place)
    if (count == 0xFFFF or length == 0xFFFFFFFF) and locator >= 0 and len(tail) >= locator + 56:
        count, length = struct.unpack("<QQ", tail[locator + 32 : locator + 48])
    if count > _ENTRIES or length > 256 * _ENTRIES:
        raise ValueError(f"it has {count:,} members, and at most {_ENTRIES:,} are read")
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError, IndexError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # EINVAL: a place before the start
            raise
        raise ValueError(f"it is a damaged zip archive: {error}") from error
    if not packed and any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("its members are compressed")
    if not packed and sum(member.file_size for member in members) > size:
        raise ValueError("its members overlap")
    stream.seek(0)
    return members


class CountedReader:
    """A file for torch's unpickler, which reads once or more for each operation: it may read some million times only.

    Raises `ValueError` from any read after that.
    """

    def __init__(self, stream: io.BufferedReader, reads: int = 500_000) -> None:
        self._stream, self._left = stream, reads
        self.seek, self.tell = stream.seek, stream.tell

    def _spend(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError("its list of objects is too long")

    def read(self, size: int = -1) -> bytes:
        """Read as a file does."""
        self._spend()
        return self._stream.read(size)

    def readline(self, size: int = -1) -> bytes:
        """Read a line as a file does."""
        self._spend()
        return self._stream.readline(min(size, 1 << 16) if size >= 0 else 1 << 16)

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer as a file does."""
        self._spend()
        return self._stream.readinto(buffer)


def _refuse_special(status: os.stat_result, where: str, fault: type[DqtoolError]) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    kind = next((name for test, name in _KINDS if test(mode)), "special file")
    fix = None if stat.S_ISDIR(mode) else _REGULAR
    raise fault(f"This is a {kind}, and an ordinary file is needed", where=where, fix=fix)


_KINDS = (
    (stat.S_ISDIR, "directory"),
    (stat.S_ISFIFO, "pipe"),
    (stat.S_ISSOCK, "socket"),
    (stat.S_ISCHR, "device"),
    (stat.S_ISBLK, "device"),
)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text) if len(text) < 400 else math.inf
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value

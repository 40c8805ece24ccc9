"""Arrays of `.npz` files, read without unpickling and within bounds; what `numpy.savez` and the ADM suite write."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dqtool.artifacts.faults import os_fault
from dqtool.artifacts.reading import check_archive, open_regular
from dqtool.errors import ArtifactError

__all__ = ["LARGEST", "NPZ", "array_header", "npz_arrays", "npz_names", "opened_npz"]

_LONGEST_HEADER = 10_000
"""Most bytes of the text that says an array's shape and type."""
LARGEST = 64 << 20
"""Most bytes of an array that is read whole (the covariance of 2,048 features takes 32 MiB), and of one image."""
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    NotImplementedError,
    RecursionError,
    MemoryError,  # Python's parser on nested brackets in a header
    SyntaxError,
    RuntimeError,  # an encrypted member
)
NPZ = "Give a file in the ADM suite's layout (arr_0, or mu, sigma, mu_s, sigma_s), or make one with `dqtool stats`"


def npz_names(path: str | os.PathLike[str]) -> list[str]:
    """Return the names of the arrays in an npz file. Raises `EnvironmentFault` or `ArtifactError`."""
    with opened_npz(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def npz_arrays(path: str | os.PathLike[str], names: Sequence[str], limit: int = LARGEST) -> dict[str, np.ndarray]:
    """Return these arrays whole, which together have at most `limit` bytes; never unpickles.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: it lacks one, or is no npz file, or an array is larger.
    """
    found = npz_names(path)
    for name in names:
        if name not in found:
            raise ArtifactError(
                f"This file has no {name}, only {', '.join(found) or 'nothing'}", where=os.fspath(path), fix=NPZ
            )
    arrays, total = {}, 0
    with opened_npz(path) as archive:
        for name in names:
            with archive.open(f"{name}.npy") as stream:
                shape, _, dtype = array_header(stream)
            total += math.prod(shape) * dtype.itemsize
            if total > limit:
                raise ArtifactError(
                    f"The arrays up to {name!a:.80} have {total:,} bytes, and at most {limit:,} are read",
                    where=os.fspath(path),
                    fix=NPZ,
                )
            with archive.open(f"{name}.npy") as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


@contextlib.contextmanager
def opened_npz(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
    """Open an npz file whose list of members is honest."""
    with _npz_faults(os.fspath(path)), open_regular(path) as stream:
        check_archive(stream, packed=True)
        with zipfile.ZipFile(stream) as archive:
            yield archive


def array_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Return shape, Fortran order and type of the array that a member holds; raises what `opened_npz` turns into a fault."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    length = stream.read(2 if version == (1, 0) else 4)
    if int.from_bytes(length, "little") > _LONGEST_HEADER:  # numpy inflates it before it looks
        raise ValueError("a header that no array has")
    shape, is_fortran, dtype = read(io.BytesIO(length + stream.read(int.from_bytes(length, "little"))))
    if not all(type(side) is int and 0 <= side < 1 << 48 for side in shape) or len(shape) > 8:
        raise ValueError("a shape that no array has")
    return shape, is_fortran, dtype


@contextlib.contextmanager
def _npz_faults(given: str) -> Iterator[None]:
    """Raise what goes wrong while an npz file is read as `ArtifactError` or `EnvironmentFault`."""
    try:
        yield
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a place before the file's start, which a damaged archive names
            raise ArtifactError("This is no npz file, or it is damaged", where=given, fix=NPZ) from error
        raise os_fault(error, given) from error
    except _DAMAGE as error:
        raise ArtifactError("This is no npz file, or it is damaged", where=given, fix=NPZ) from error

"""Errors of the operating system, said as dqtool says them."""

from __future__ import annotations

import errno
import os

from dqtool.errors import EnvironmentFault

__all__ = ["os_fault"]

_FULL = "Free some space or write elsewhere with -o, and run again; what stood there before is untouched"
_ELSEWHERE = "Choose another place with -o, or make this one writable"
_HANDLES = "Raise the limit with `ulimit -n 4096`, and run again"
_FAULTS = {
    errno.ENOSPC: ("The disk is full", _FULL),
    errno.EDQUOT: ("The disk quota is used up", _FULL),
    errno.EFBIG: ("The file is larger than this system allows", _FULL),
    errno.EROFS: ("The file system is read-only", _ELSEWHERE),
    errno.EACCES: ("There is no permission to read or write this path", _ELSEWHERE),
    errno.EPERM: ("The system does not permit this write", _ELSEWHERE),
    errno.ENOENT: ("There is no such file or directory", "Check the path; make a missing directory with mkdir -p"),
    errno.ENOTDIR: ("A part of this path is a file, not a directory", "Check the path"),
    errno.EISDIR: ("This is a directory where a file is expected", "Check the path"),
    errno.EMFILE: ("Too many files are open", _HANDLES),
    errno.ENFILE: ("Too many files are open on this machine", _HANDLES),
    errno.ENOMEM: ("There is not enough memory", "Close other programs, or use a larger machine"),
    errno.ELOOP: ("This link leads back to itself", "Check the path"),
    errno.ENXIO: ("Nothing can be read from or written to this special file", "Give an ordinary file"),
    errno.ENAMETOOLONG: ("The name is too long for this file system", "Choose a shorter name with -o"),
}


def os_fault(error: OSError, path: str | os.PathLike[str]) -> EnvironmentFault:
    """Return the fault that says what an operating system error on `path` means, and what to do about it."""
    number = error.errno
    if number is None:  # safetensors raises the right class without its number
        number = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(type(error), 0)
    what, fix = _FAULTS.get(number, (f"The system reports: {error.strerror or error}", "Check the path"))
    return EnvironmentFault(what, where=os.fspath(path), fix=fix)

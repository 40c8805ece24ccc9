"""Settings of the C library's memory allocator for tensors that are allocated and freed often. Needs no torch."""

from __future__ import annotations

import ctypes
import mmap
import os

__all__ = ["FilePages", "keep_freed_memory", "return_freed_memory"]

PAGE = mmap.PAGESIZE

_DONT_NEED = 4
"""Value of MADV_DONTNEED in sys/mman.h."""


def keep_freed_memory() -> None:
    """Make glibc keep the memory of freed tensors instead of returning it to the system after each operation.

    By default glibc maps and unmaps every tensor above 128 KiB, and the page faults cost more than the arithmetic: the
    element-wise operations of quantization run 2-3 times faster with this setting. Has no effect with other C
    libraries.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # malloc.h
    mallopt(mmap_threshold, 32 << 20)  # the largest that glibc accepts
    mallopt(trim_threshold, 1 << 30)
    mallopt(top_pad, 64 << 20)


def return_freed_memory() -> None:
    """Return the allocator's unused memory to the system, for instance before the memory of a step is measured."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


class FilePages:
    """Resident pages of a mapped file that nobody writes to.

    Released pages take no memory; reading them again finds them in the system's page cache. `owner` (a tensor of the
    file, for instance) is kept alive so that the mapping stays valid. On a system without /proc/self/maps nothing is
    released.
    """

    def __init__(self, path: str | os.PathLike[str], owner: object) -> None:
        self.owner = owner
        self._mappings: list[tuple[int, int]] = []
        wanted = os.path.realpath(path)
        try:
            self._madvise = ctypes.CDLL("libc.so.6").madvise
            with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as stream:
                for line in stream:
                    fields = line.rstrip("\n").split(maxsplit=5)
                    if len(fields) == 6 and fields[5] == wanted:
                        begin, _, end = fields[0].partition("-")
                        self._mappings.append((int(begin, 16), int(end, 16)))
        except (OSError, AttributeError, ValueError):
            self._mappings = []

    def release(self, address: int, size: int) -> int:
        """Release the whole pages within `size` bytes from `address` and return the number of bytes released.

        Pages outside the file's mappings are left alone, since other memory would lose its content.
        """
        first, last = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
        if first >= last or not any(begin <= first and last <= end for begin, end in self._mappings):
            return 0
        self._madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)
        return last - first

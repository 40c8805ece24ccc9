"""The C library's memory allocator, set up for tensors that come and go. No torch."""

from __future__ import annotations

import ctypes
import mmap
import os

__all__ = ["FilePages", "keep_freed_memory", "return_freed_memory"]

PAGE = mmap.PAGESIZE

_DONT_NEED = 4
"""MADV_DONTNEED of sys/mman.h."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors instead of returning it to the system after each operation.

    By default every tensor past 128 KiB is mapped and unmapped anew, and the page faults cost more than the arithmetic:
    quantization's element-wise operations run 2-3 times faster with this. Other C libraries are left as they are.
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
    """Give memory that was kept back to the system now: before something whose own need is measured."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


class FilePages:
    """Resident pages of a mapped file that nobody writes to. Once let go they need no memory, and whoever reads them again
    finds them in the system's cache.

    `owner` is kept, so that what is mapped now stays mapped: a tensor of the file, say. Where the system has no list of
    mappings, nothing is let go.
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
        """Let go of the whole pages in `size` bytes from `address`; returns their bytes. What isn't in a mapping of the file
        is left alone: other memory would lose what it holds."""
        first, last = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
        if first >= last or not any(begin <= first and last <= end for begin, end in self._mappings):
            return 0
        self._madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _DONT_NEED)
        return last - first

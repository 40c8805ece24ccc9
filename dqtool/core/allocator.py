"""The C library's memory allocator, set up for tensors that come and go. No torch."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable

__all__ = ["keep_freed_memory", "release_file_pages", "return_freed_memory"]

PAGE = mmap.PAGESIZE


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


def release_file_pages(path: str | os.PathLike[str], ranges: Iterable[tuple[int, int]]) -> int:
    """Let go of resident pages of a mapped file that nobody writes to: whoever reads them again finds them in the system's
    cache. Returns the bytes of whole pages that were named.

    `ranges` are (address, bytes); those that are not in a mapping of `path` are left alone (letting go of other memory
    would lose what it holds), as is everything where the system has no list of mappings.
    """
    wanted = os.path.realpath(path)
    mappings = []
    try:
        madvise = ctypes.CDLL("libc.so.6").madvise
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as stream:
            for line in stream:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and fields[5] == wanted:
                    begin, _, end = fields[0].partition("-")
                    mappings.append((int(begin, 16), int(end, 16)))
    except (OSError, AttributeError, ValueError):
        return 0
    dont_need, released = 4, 0  # sys/mman.h
    for address, size in ranges:
        first, last = -(-address // PAGE) * PAGE, (address + size) // PAGE * PAGE
        if first < last and any(begin <= first and last <= end for begin, end in mappings):
            madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), dont_need)
            released += last - first
    return released

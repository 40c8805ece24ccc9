"""`FilePages` releases pages of its mapped file and of nothing else."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from dqtool.core.allocator import PAGE, FilePages


def resident(path: Path) -> int:
    """Return the resident KiB of a file's mapping in this process."""
    lines = Path("/proc/self/smaps").read_text(errors="replace").splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith(str(path)))
    return int(next(line for line in lines[start:] if line.startswith("Rss:")).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are listed by Linux")
def test_pages_of_a_file_are_let_go_and_read_again(tmp_path: Path) -> None:
    path = tmp_path.resolve() / "file"
    content = np.random.default_rng(0).integers(0, 256, 64 * PAGE, dtype=np.uint8)
    path.write_bytes(content.tobytes())
    with path.open("rb") as stream:
        mapped = np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    assert np.array_equal(mapped, content)
    before = resident(path)
    assert FilePages(path, mapped).release(mapped.ctypes.data + 1, 32 * PAGE) == 31 * PAGE  # whole pages only
    assert resident(path) <= before - 31 * PAGE // 1024
    assert np.array_equal(mapped, content)


def test_other_memory_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE))
    own = np.full(16 * PAGE, 7, dtype=np.uint8)
    assert FilePages(path, own).release(own.ctypes.data, own.nbytes) == 0
    assert (own == 7).all()

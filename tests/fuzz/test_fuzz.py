"""The short form of `make fuzz`: some hundred inputs to each parser, none of which may end in anything but a code 2 to 5."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from driver import MEGABYTES, fuzz


def test_no_input_is_a_bug_slow_or_large(tmp_path: Path):
    found = fuzz(3000, 1, tmp_path)
    assert found["failures"] == []
    assert (found["tracebacks"], found["code 1"], found["files outside"]) == (0, 0, 0)
    assert found["over time"] <= 2, found["kinds"]  # on a busy machine the scheduler takes a second now and then
    assert found["megabytes grown"] < MEGABYTES

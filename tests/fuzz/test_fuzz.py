"""The short form of `make fuzz`: inputs to every reader, none of which may end in anything but a code 2 to 5."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).parent / "driver.py"


def test_no_input_is_a_bug_slow_or_large_or_writes_outside(tmp_path: Path) -> None:
    # In a process of its own: an audit hook can't be taken off again.
    done = subprocess.run(
        [sys.executable, str(DRIVER), "--inputs", "3000", "--seed", "1", "-o", str(tmp_path / "fuzz")],
        cwd=DRIVER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "fuzz.json").is_file(), done.stderr
    found = json.loads((tmp_path / "fuzz.json").read_text())
    assert found["failures"] == []
    assert (found["tracebacks"], found["code 1"], found["outside"], found["files left"]) == (0, 0, 0, [])
    assert done.returncode == 0, done.stdout


def test_writes_and_processes_are_seen_wherever_they_go(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from watch import Watch
inside, outside = Path(sys.argv[1]) / "in", Path(sys.argv[1]) / "out"
inside.mkdir(), outside.mkdir()
watch = Watch(inside)
def seen(strict, act):
    with watch.watching(strict):
        act()
    count = len(watch.faults)
    watch.faults.clear()
    return count
assert seen(False, lambda: (inside / "a").write_text("")) == 0
assert seen(True, lambda: (inside / "a").write_text("")) == 1
assert seen(True, lambda: (inside / "a").read_text()) == 0
assert seen(False, lambda: (inside / "../out/a").write_text("")) == 1
assert seen(False, lambda: (outside / "d").mkdir()) == 1
assert seen(False, lambda: (inside / "a").rename(outside / "b")) == 1
assert seen(False, lambda: (outside / "c").symlink_to("b")) == 1
assert seen(False, lambda: os.system("true")) == 1
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=DRIVER.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

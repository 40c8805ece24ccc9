"""Whatever is refused takes a second of CPU time and 200 MB over its size at most: hostile files for every reader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).parent / "bounds.py"
SECONDS, MEGABYTES = 1.0, 200
ACCEPTED = {("accepted", "a pattern that backtracks"), ("accepted", "a pattern of repeats")}
"""Patterns that a reader takes, since it matches them with bounded work."""


def test_every_payload_is_refused_within_a_second_and_200_megabytes(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(tmp_path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) > 100
    bad = {
        name: (said, seconds, grown)
        for name, (said, seconds, grown, size) in found.items()
        if not ((said.startswith("code ") and said != "code 1") or (said, name) in ACCEPTED)
        or seconds > SECONDS
        or grown > MEGABYTES + size / (1 << 20)
    }
    assert bad == {}

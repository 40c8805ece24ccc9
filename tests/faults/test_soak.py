"""A short form of `make soak`: commands are killed at random times while another process reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

DRIVER = Path(__file__).parents[1] / "soak" / "kills.py"


def test_killed_commands_leave_nothing_wrong(tmp_path: Path) -> None:
    command = [sys.executable, str(DRIVER), "--models", "tiny", "--kills", "4", "--minutes", "0.2"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [*command, "-o", str(tmp_path / "soak")], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    counts = json.loads((tmp_path / "soak.json").read_text())["counts"]
    assert counts["signals"] > 0
    assert counts["reads"] > 0
    assert counts["faults"] == 0


def test_killed_stages_go_on_within_a_batch_and_a_block(tmp_path: Path) -> None:
    command = [sys.executable, str(DRIVER.with_name("large.py")), "--arch", "tiny", "--kills", "1", "--at-once"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run(
        [*command, "-o", str(tmp_path / "large")], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    rows = json.loads((tmp_path / "large.json").read_text())["stages"]
    assert list(rows) == ["calibrate", "distill", "second pass", "branches", "eval"]
    assert sum(row["kills"] for row in rows.values()) > 0

"""`--nproc` on the command line: real processes by torchrun, whose result and errors are the command's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "dqtool", *arguments]
    return subprocess.run(
        line, cwd=cwd, capture_output=True, text=True, env=ONE_THREAD | extra, stdin=subprocess.DEVNULL
    )


def test_the_error_of_a_process_is_the_error_of_the_command(made: Path) -> None:
    found = command("calibrate", "--steps", "4", "--samples", "2", "--nproc", "2", cwd=made)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.splitlines() == [
        "dqtool calibrate: 2 samples can't cover 4 steps. Where: --samples. Give at least one sample per step; 50 and more "
        "a step is usual."
    ]


def test_two_processes_print_one_path(made: Path, tmp_path: Path) -> None:
    output = str(tmp_path / "samples.png")
    found = command("sample", "exported", "-n", "4", "--batch-size", "2", "-o", output, "--nproc", "2", cwd=made)
    assert (found.returncode, found.stdout) == (0, f"{output}\n"), found.stderr
    assert found.stderr.count("sample 4/4 image") == 1
    assert Path(output).is_file()


def test_a_dry_run_starts_no_processes(made: Path, run: Run) -> None:
    found = run("distill", "--nproc", "2", "--dry-run", cwd=made)
    assert found.returncode == 0, found.stderr
    assert "blocks" in found.stdout


@pytest.mark.parametrize("count", ["0", "x"])
def test_a_number_of_processes_is_one_or_more(made: Path, run: Run, count: str) -> None:
    assert run("distill", "--nproc", count, cwd=made).returncode == 2


def test_torchrun_and_nproc_exclude_each_other(made: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    variables = dict.fromkeys(names, "2") | {"MASTER_ADDR": "127.0.0.1"}
    found = command("distill", "--nproc", "2", cwd=made, **variables)
    assert found.returncode == 2
    assert "torchrun started this process" in found.stderr

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dqtool.artifacts import lock
from dqtool.errors import EnvironmentFault

HOLD = """
import sys
from pathlib import Path
from dqtool.artifacts import lock
from dqtool.artifacts.files import staging
with lock(sys.argv[1]), staging(Path(sys.argv[1])) as area:
    (area / "data").write_text("half")
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_held_by_another_process_names_it(tmp_path: Path):
    output = tmp_path / "x.safetensors"
    process = holder(output)
    with pytest.raises(EnvironmentFault, match=rf"process {process.pid}\).*x\.safetensors") as caught, lock(output):
        pytest.fail("two holders")
    assert caught.value.exit_code == 4
    with lock(tmp_path / "y.safetensors"):
        pass
    process.communicate("")
    with lock(output):
        pass
    assert list(tmp_path.iterdir()) == []


def test_dies_with_its_holder_and_clears_what_that_one_left(tmp_path: Path):
    output = tmp_path / "x.safetensors"
    process = holder(output)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    bystander = tmp_path / ".x.safetensors.partial"
    bystander.mkdir()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        f".x.safetensors.{process.pid}.tmp",
        ".x.safetensors.lock",
        ".x.safetensors.partial",
    ]
    with lock(output):
        assert (tmp_path / ".x.safetensors.lock").read_text() == f"{os.getpid()}\n"
    assert list(tmp_path.iterdir()) == [bystander]


def test_what_another_writes_under_a_longer_name_is_left_alone(tmp_path: Path):
    process = holder(tmp_path / "exported.onnx")
    with lock(tmp_path / "exported"):
        assert (tmp_path / f".exported.onnx.{process.pid}.tmp" / "data").read_text() == "half"
    process.communicate("")
    assert process.returncode == 0


def test_is_not_entered_twice_and_is_released_on_failure(tmp_path: Path):
    output = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError), lock(output):
        with pytest.raises(EnvironmentFault, match="Another dqtool"), lock(output):
            pytest.fail("two holders")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_was_removed_between_open_and_lock_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import fcntl

    output, real, calls = tmp_path / "x.safetensors", fcntl.flock, 0

    def flock(descriptor: int, operation: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:  # the previous holder leaves just now
            (tmp_path / ".x.safetensors.lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(output):
        assert calls == 2
        with pytest.raises(EnvironmentFault), lock(output):
            pytest.fail("two holders")


def test_missing_directory(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="no such file or directory"), lock(tmp_path / "no" / "x"):
        pytest.fail("held nothing")


def test_many_processes_never_hold_it_at_once(tmp_path: Path):
    code = """
import sys, time
from pathlib import Path
from dqtool.artifacts import lock
from dqtool.errors import EnvironmentFault
mark, wins = Path(sys.argv[1] + ".mark"), 0
end = time.monotonic() + 1.5
while time.monotonic() < end:
    try:
        with lock(sys.argv[1]):
            mark.touch(exist_ok=False)
            mark.unlink()
            wins += 1
    except EnvironmentFault:
        pass
print(wins)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    wins = [int(process.communicate()[0]) for process in processes]
    assert all(process.returncode == 0 for process in processes) and sum(wins) > 3

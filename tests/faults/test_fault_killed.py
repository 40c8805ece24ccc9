"""SIGTERM ends a command like Ctrl-C; the next run with the same output removes what a killed command left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import listing

from dqtool.artifacts import Workspace, clear_leftovers
from dqtool.artifacts.files import staging

TRAIN = ("distill", "--iters", "12", "--refine-iters", "2", "--seed", "7")


def start(chain: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dqtool", *arguments]
    return subprocess.Popen(
        command, cwd=chain, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def pieces(index: Path) -> list[str]:
    return list(json.loads(index.read_text())["pieces"]) if index.exists() else []


def wait_for_pieces(process: subprocess.Popen[str], index: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(pieces(index)) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_sigterm_keeps_finished_pieces_and_exits_143_within_five_seconds(run: Run, chain: Path) -> None:
    before = listing(chain)
    process = start(chain, *TRAIN, "-o", "ended.safetensors")
    wait_for_pieces(process, chain / ".ended.safetensors.partial" / "index.json", 3)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, messages = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert (process.returncode, output) == (143, ""), messages
    last = messages.splitlines()[-1]
    assert last.startswith("dqtool distill: terminated; ")
    assert "finished pieces are kept in .ended.safetensors.partial; the same command goes on" in last
    left = listing(chain)
    assert {name for name in left if name not in before} == {
        name for name in left if name.startswith(".ended.safetensors.partial")
    }
    assert run(*TRAIN, "-o", "ended.safetensors", cwd=chain).returncode == 0


@pytest.mark.parametrize("forced", [False, True], ids=["plain", "forced"])
def test_a_killed_run_goes_on_from_its_pieces(run: Run, chain: Path, forced: bool) -> None:
    options = ("--force",) if forced else ()
    assert run(*TRAIN, "-o", "k.safetensors", cwd=chain).returncode == 0
    whole = (chain / "k.safetensors").read_bytes()
    if not forced:
        (chain / "k.json").unlink()
        (chain / "k.safetensors").unlink()
    partial = chain / ".k.safetensors.partial"
    process = start(chain, *TRAIN, "-o", "k.safetensors", *options)
    wait_for_pieces(process, partial / "index.json", 3)
    process.kill()
    process.communicate()
    kept = pieces(partial / "index.json")
    assert len(kept) >= 3
    assert {path.suffix for path in partial.iterdir()} == {".json", ".tensors"}  # no partial file
    assert json.loads((partial / "index.json").read_text())["forced"] is forced
    (chain / "k.json").unlink(missing_ok=True)
    (chain / "k.safetensors").unlink(missing_ok=True)
    result = run(*TRAIN, "-o", "k.safetensors", *options, cwd=chain)
    assert result.returncode == 0, result.stderr
    assert (chain / "k.safetensors").read_bytes() == whole
    assert [path.name for path in chain.iterdir() if path.name.startswith(".k.")] == []


def test_cached_answers_sweep_what_a_killed_run_left(run: Run, chain: Path) -> None:
    arguments = ("export", "-o", "swept")
    assert run(*arguments, cwd=chain).returncode == 0
    before = listing(chain)
    (chain / ".swept.999999999.tmp").mkdir()
    (chain / ".swept.999999999.tmp" / "new").write_text("half")
    (chain / ".swept.lock").write_text("999999999\n")
    Workspace(chain / "swept", "of another run").save("a", {"x": torch.ones(1)})
    result = run(*arguments, cwd=chain)
    assert "cached" in result.stderr
    assert listing(chain) == before


def test_forced_runs_don_t_go_on_from_pieces_of_plain_ones(tmp_path: Path) -> None:
    output = tmp_path / "x.safetensors"
    Workspace(output, "key").save("a", {"x": torch.ones(1)})
    assert Workspace(output, "key", forced=True).keys() == []
    Workspace(output, "key", forced=True).save("b", {"x": torch.ones(1)})
    assert Workspace(output, "key", forced=True).keys() == ["b"]
    assert Workspace(output, "key").keys() == ["b"]


def test_leftovers_of_a_live_writer_are_left_alone(tmp_path: Path) -> None:
    output = tmp_path / "x.json"
    live = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        theirs = tmp_path / f".x.json.{live.pid}.tmp"
        theirs.mkdir()
        with staging(output) as mine:
            assert mine.is_dir()
        assert theirs.is_dir()
    finally:
        live.kill()
        live.wait()
    with staging(output):
        assert not theirs.exists()
    clear_leftovers(output)
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_left_to_a_program_that_ignores_it() -> None:
    code = (
        "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.argv = ['dqtool', '--version']\n"
        "from dqtool.__main__ import main; main(); os.kill(os.getpid(), signal.SIGTERM); print('alive')"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False)
    assert found.stdout.endswith("alive\n"), found.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_that_a_library_turns_into_an_error_of_its_own_still_ends_the_command(name: str, code: int) -> None:
    script = f"""
import os, signal, sys
import dqtool.cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
def invoke(arguments):
    try:
        os.kill(os.getpid(), signal.{name})
    except KeyboardInterrupt:
        raise ValueError("could not determine the shape of object type")
dqtool.cli.invoke = invoke
sys.argv = ["dqtool", "calibrate"]
from dqtool.__main__ import main
sys.exit(main())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False)
    assert found.returncode == code, found.stderr
    assert "bug" not in found.stderr


def test_a_signal_that_a_library_swallows_ends_the_command_at_its_next_piece(tmp_path: Path) -> None:
    script = f"""
import contextlib, os, signal, sys
import torch
import dqtool.cli
from dqtool.artifacts.workspace import Workspace
def invoke(arguments):
    work = Workspace({str(tmp_path / "x.safetensors")!r}, "print")
    work.save("first", {{"a": torch.zeros(1)}})
    with contextlib.suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
    work.save("second", {{"a": torch.zeros(1)}})
dqtool.cli.invoke = invoke
sys.argv = ["dqtool", "calibrate"]
from dqtool.__main__ import main
sys.exit(main())
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=False)
    assert found.returncode == 143, found.stderr
    assert "1 finished pieces are kept" in found.stderr

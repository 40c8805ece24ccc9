"""Ctrl-C: exit code 130, one line, no partial artifact, and the same command continues after the finished blocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from helpers import listing

from dqtool.models.families.unet2d import UNet2D
from dqtool.training import block_loop

ARGUMENTS = ("distill", "--iters", "12", "--refine-iters", "2", "--seed", "5")


def test_distill_goes_on_from_the_finished_blocks_to_the_same_bits(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run(*ARGUMENTS, "-o", "whole.safetensors", cwd=chain).returncode == 0
    before = listing(chain)
    index = chain / ".parted.safetensors.partial" / "index.json"
    command = [sys.executable, "-m", "dqtool", *ARGUMENTS, "-o", "parted.safetensors"]
    process = subprocess.Popen(
        command,
        cwd=chain,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background inherits an ignored SIGINT, and Python does not change that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while len(finished(index)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    output, messages = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ""), messages
    assert messages.splitlines()[-1].startswith("dqtool distill: interrupted")
    assert "Traceback" not in messages
    kept = finished(index)
    assert len(kept) >= 4
    left = {name: content for name, content in listing(chain).items() if not name.startswith(index.parent.name)}
    assert left == before

    trained: list[str] = []
    train_block = block_loop.train_block

    def counting(*arguments: Any, **options: Any) -> Any:
        trained.append(arguments[-1])
        return train_block(*arguments, **options)

    monkeypatch.setattr(block_loop, "train_block", counting)
    result = run(*ARGUMENTS, "-o", "parted.safetensors", cwd=chain)
    assert result.returncode == 0, result.stderr
    assert trained
    assert not set(trained) & set(kept)
    assert (chain / "parted.safetensors").read_bytes() == (chain / "whole.safetensors").read_bytes()
    assert not index.parent.exists()


UNTRAINED = ("--iters", "0", "--refine-iters", "0", "--no-correct-noise")

PHASES = {
    "grids of weights": (("distill", *UNTRAINED), "dqtool.nn.surgery.search_weight"),
    "low-rank branches": (("distill", *UNTRAINED, "--low-rank", "2"), "dqtool.nn.low_rank.split_weight"),
    "errors of operands": (
        ("distill", *UNTRAINED, "--protect", "30", "--passes", "8"),
        "dqtool.precision.sensitivity._run",
    ),
    "grids of operands": (
        ("distill", *UNTRAINED, "--protect", "30", "--passes", "8"),
        "dqtool.precision.sensitivity.search_weight",
    ),
    "a sensitivity report": (
        ("sensitivity", "calibrated.safetensors", "--passes", "8"),
        "dqtool.precision.sensitivity._run",
    ),
    "samples of plans": (
        ("distill", *UNTRAINED, "--bits", "auto", "--target-size", "100", "--passes", "4"),
        "dqtool.models.sampling.sampler.by_rows",
    ),
    "own trajectory": (
        ("distill", "--iters", "0", "--refine-iters", "2", "--no-correct-noise"),
        "dqtool.models.sampling.sampler.by_rows",
    ),
    "correction": (
        ("distill", "--iters", "0", "--refine-iters", "0", "--correct-noise"),
        "dqtool.models.sampling.sampler.by_rows",
    ),
}
"""Commands, and the function whose calls are their work, by the part that is interrupted."""


@pytest.mark.parametrize("phase", PHASES)
def test_no_finished_call_is_made_again(
    phase: str, run: Run, chain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, target = PHASES[phase]
    suffix = ".json" if arguments[0] == "sensitivity" else ""
    module, _, name = target.rpartition(".")
    original, made, limit = getattr(import_module(module), name), [0], [-1]

    def counted(*given: Any, **options: Any) -> Any:
        if made[0] == limit[0]:
            raise KeyboardInterrupt
        made[0] += 1
        return original(*given, **options)

    monkeypatch.setattr(target, counted)
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "one"))
    result = run(*arguments, "-o", f"whole{suffix}", cwd=chain)
    assert result.returncode == 0, result.stderr
    stop = 30 if phase == "samples of plans" else 6  # the weights of steps run the sampler, too
    whole, made[0], limit[0] = made[0], 0, stop
    assert whole > stop
    monkeypatch.setattr("dqtool.artifacts.checkpoints.EVERY", 0.0)
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "two"))
    assert run(*arguments, "-o", f"parted{suffix}", cwd=chain).returncode == 130
    assert made[0] == stop
    limit[0] = -1
    assert run(*arguments, "-o", f"parted{suffix}", cwd=chain).returncode == 0
    assert made[0] == whole
    if not suffix:  # a report holds times
        assert (chain / "parted").read_bytes() == (chain / "whole").read_bytes()


def test_an_interrupt_anywhere_is_one_line(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = listing(chain)
    for target, arguments in (
        ("dqtool.stages.dilate.produce", ("dilate", "tiny", "--force")),
        ("dqtool.stages.export.write_directory", ("export", "--force")),
        ("dqtool.stages.inspect.describe", ("inspect", "tiny")),
    ):
        monkeypatch.setattr(target, interrupted)
        result = run(*arguments, cwd=chain)
        assert (result.returncode, result.stdout) == (130, "")
        assert result.stderr.count("\n") == 1
        assert "interrupted" in result.stderr
        assert listing(chain) == before


def finished(index: Path) -> list[str]:
    """Return the names of the blocks that an unfinished run has kept."""
    try:
        return list(json.loads(index.read_text())["pieces"])
    except FileNotFoundError:
        return []


@pytest.mark.parametrize("calls", [3, 7, 12, 17])
def test_calibrate_goes_on_from_the_steps_it_had_recorded(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    arguments = ("calibrate", "dilated.safetensors", "--steps", "4", "--samples", "16", "--batch-size", "2")
    assert run(*arguments, "-o", "whole.safetensors", cwd=chain).returncode == 0
    monkeypatch.setattr("dqtool.artifacts.checkpoints.EVERY", 0.0)
    predict, left = UNet2D.predict, [calls]

    def counted(self: UNet2D, *given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return predict(self, *given)

    monkeypatch.setattr(UNet2D, "predict", counted)
    assert run(*arguments, "-o", "parted.safetensors", cwd=chain).returncode == 130
    kept = finished(chain / ".parted.safetensors.partial" / "index.json")
    left[0] = 10**9
    assert run(*arguments, "-o", "parted.safetensors", cwd=chain).returncode == 0
    first, used = 10**9 - left[0], predictions_of(run, chain, arguments, left)
    assert len(kept) == 0 or first < used
    assert (chain / "parted.safetensors").read_bytes() == (chain / "whole.safetensors").read_bytes()
    assert not (chain / ".parted.safetensors.partial").exists()


def predictions_of(run: Run, chain: Path, arguments: tuple[str, ...], left: list[int]) -> int:
    """Return the number of predictions of a whole run."""
    left[0] = 10**9
    assert run(*arguments, "-o", "other.safetensors", cwd=chain).returncode == 0
    return 10**9 - left[0]


def test_stages_go_on_with_smaller_batches_where_memory_runs_out(
    run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict = UNet2D.predict

    def small(self: UNet2D, model: Any, x: Any, *given: Any) -> Any:
        if len(x) > 4:
            raise MemoryError
        return predict(self, model, x, *given)

    monkeypatch.setattr(UNet2D, "predict", small)
    for arguments in (
        ("calibrate", "--steps", "4", "--samples", "32", "--scaling", "keep"),
        ("distill", "--iters", "2", "--refine-iters", "2", "--no-correct-noise"),
        ("export",),
        ("eval", "--samples", "8", "--metrics", "similarity"),
    ):
        result = run(*arguments, "--force", cwd=chain)
        assert result.returncode == 0, result.stderr
        if arguments[0] != "export":
            assert "memory ran out" in result.stderr, arguments


def test_eval_goes_on_from_its_finished_images(run: Run, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("eval", "distilled.safetensors", "--samples", "12", "--batch-size", "2", "--metrics", "similarity")
    assert run(*arguments, "-o", "whole.json", cwd=chain).returncode == 0
    monkeypatch.setattr("dqtool.artifacts.checkpoints.EVERY", 0.0)
    predict, left = UNet2D.predict, [14]

    def counted(self: UNet2D, *given: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return predict(self, *given)

    monkeypatch.setattr(UNet2D, "predict", counted)
    result = run(*arguments, "-o", "parted.json", cwd=chain)
    assert result.returncode == 130
    assert "finished pieces are kept" in result.stderr
    left[0] = 10**9
    assert run(*arguments, "-o", "parted.json", cwd=chain).returncode == 0
    assert 10**9 - left[0] == 24 - 14  # six batches of four steps: every step was kept
    whole, parted = (json.loads((chain / name).read_text())["metrics"] for name in ("whole.json", "parted.json"))
    assert parted == whole

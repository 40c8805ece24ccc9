"""The check for a GPU, at tiny sizes in Triton's interpreter: right kernels pass, wrong ones fail, and what was found stays."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels of the cuda runtime are written in Triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import gpu_check
from gpu_check import Check, OutOfTime, limited

from dqtool.runtimes.cuda import launch
from dqtool.runtimes.cuda.tiles import Tile


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "START", time.perf_counter())
    return Check(10, tmp_path)


def written(check: Check) -> dict[str, Any]:
    return json.loads(check.path.with_suffix(".json").read_text())


def test_attention_is_compared(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check.check_attention(check, (40,), 20, 70)
    assert check.failures == 0
    assert len(written(check)["attention"]) == 4
    right = launch.attend
    monkeypatch.setattr(launch, "attend", lambda *arguments: 1.01 * right(*arguments))
    gpu_check.check_attention(check, (40,), 20, 70)
    assert check.failures == 4


def test_epilogues_are_compared(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check.check_epilogues(check, 5, 20, 40)
    assert check.failures == 0
    assert len(written(check)["epilogues"]) == 6
    right = launch.multiply_codes

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        out = right(*arguments, **options)
        out.view(-1)[0] += 2
        return out

    monkeypatch.setattr(launch, "multiply_codes", wrong)
    gpu_check.check_epilogues(check, 5, 20, 40)
    assert check.failures == 6


def test_a_block_that_fails_leaves_the_counts_of_the_others(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    right = launch.multiply_codes

    def picky(*arguments: Any, **options: Any) -> torch.Tensor:
        if launch.product_tile().warps == 8:
            raise RuntimeError("too many resources")
        return right(*arguments, **options)

    monkeypatch.setattr(launch, "multiply_codes", picky)
    before = launch.product_tile
    blocks = [(4, Tile(16, 32, warps, 1, 1, False)) for warps in (4, 8, 4)]
    gpu_check.check_blocks(check, blocks, (3, 8, 70))
    assert launch.product_tile is before
    assert written(check)["blocks of kernels"] == {"cases": 3, "compared": 96, "different": 0, "errors": 1}
    assert check.failures == 1


def test_blocks_end_with_the_time(check: Check) -> None:
    check.end = time.perf_counter() + 30
    gpu_check.check_blocks(check, [(4, Tile(16, 32, 4, 1, 1, False))] * 5, (3, 8, 70))
    assert "blocks: the other 5 of 5 were not compared" in check.lines


def test_every_line_is_in_the_files_at_once(check: Check) -> None:
    def part(check: Check) -> None:
        check.found["speed"] = {"ours": 1.5}
        check.say("ours 1.5 ms")
        assert written(check)["speed"] == {"ours": 1.5}
        assert "ours 1.5 ms" in check.path.with_suffix(".md").read_text()
        raise RuntimeError("no memory")

    check.part("Speed", part, 1)
    assert "FAILED: RuntimeError: no memory" in check.path.with_suffix(".md").read_text()
    assert written(check)["failures"] == 1


def test_a_measurement_is_stopped() -> None:
    start = time.perf_counter()
    with pytest.raises(OutOfTime, match="stopped after"), limited(0.1):
        time.sleep(10)
    assert time.perf_counter() - start < 5


def test_a_contender_that_takes_too_long_leaves_the_others(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def slow(_check: Check, _networks: Any, name: str, *_: Any) -> None:
        asked.append(name)
        if name == "fp16-compile":
            time.sleep(10)

    monkeypatch.setattr(gpu_check, "time_network", slow)
    monkeypatch.setattr(gpu_check, "COMPILE_SECONDS", 0.1)
    networks = gpu_check.Networks(check)
    monkeypatch.setattr(networks, "make_room", lambda: None)
    gpu_check.time_networks(check, networks, ["sd14"], [2], True)
    assert asked[:2] == ["fp16-compile", "ours-compile"]
    assert check.lines[0].startswith("sd14, batch 2, fp16-compile: FAILED OutOfTime")
    gpu_check.time_networks(check, networks, ["sd14"], [2], False)
    assert "ours-graph" in asked

"""`distill --blocks`: only the blocks asked for are trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dqtool.artifacts import open_artifact
from dqtool.errors import UsageError
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.shared.settings import RunSettings

BLOCK = "mid_block.resnets.0"


def distilled(chain: Path, name: str, **options: Any) -> Any:
    options = {"refine_iters": 0} | options
    given = DistillOptions(str(chain / "calibrated.safetensors"), str(chain / name), correct_noise=False, **options)
    return open_artifact(distill(given, RunSettings(quiet=True)))


@pytest.mark.parametrize(
    "options",
    [{}, {"refine_iters": 2}, {"method": "per-step", "refine_iters": None}],
    ids=["blocks", "both", "per-step"],
)
def test_one_block_is_trained_and_the_others_stay_as_initialised(chain: Path, options: dict[str, Any]) -> None:
    one = distilled(chain, "one.safetensors", iters=2, blocks=r"mid_block\.resnets\.0", **options)
    none = distilled(chain, "none.safetensors", iters=0)
    assert list(one.manifest.metrics.as_read["block_loss"]) == [BLOCK]
    a, b = one.tensors(), none.tensors()
    changed = {name for name in a if not torch.equal(a[name], b[name])}
    assert changed
    assert all(name.startswith(BLOCK + ".") for name in changed)


def test_patterns_that_match_nothing_or_are_none_are_refused(chain: Path) -> None:
    with pytest.raises(UsageError, match="matches no block"):
        distilled(chain, "x.safetensors", iters=2, blocks="nowhere")
    with pytest.raises(UsageError, match="not a regular expression"):
        DistillOptions(blocks="(")


def test_blocks_at_once_are_part_of_the_fingerprint_and_of_the_plan(chain: Path, run: Any) -> None:
    given = ("distill", "calibrated.safetensors", "-o", "at-once.safetensors", "--iters", "6", "--refine-iters", "0")
    planned = run(*given, "--parallel-blocks", "--dry-run", "--json", cwd=chain)
    work = json.loads(planned.stdout)["work"]
    assert work["repair"].endswith(" x 2 in order")
    shares = [work["first_sweep_by_processes"][str(count)] for count in (1, 2, 4)]
    assert shares[0] == 1 > shares[1] > shares[2] >= 0.25
    settings = RunSettings(quiet=True)
    common = {"iters": 1, "refine_iters": 0, "correct_noise": False, "blocks": "conv_(in|out)"}
    for options, cached in (
        ({"parallel_blocks": True}, False),
        ({"parallel_blocks": True, "repair_iters": 1}, True),  # the default
        ({"parallel_blocks": True, "repair_iters": 0}, False),
        ({}, False),
    ):
        path = str(chain / "at-once.safetensors")
        distill(DistillOptions(str(chain / "calibrated.safetensors"), path, **common, **options), settings)
        assert settings.log[-1].cached == cached
        manifest = open_artifact(path).manifest
        told = {"repair_iters": options.get("repair_iters", 1)} if options else None
        assert manifest.parameters.as_read.get("parallel_blocks") == told
        assert ("repair_block_loss" in manifest.metrics.as_read) == (told == {"repair_iters": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"static": True},
        {"protect": 30.0},
        {"bits": "auto"},
        {"low_rank": 2},
        {"keep": ("conv_in=16/16",), "low_memory": True},
        {"method": "bkd-blockwise", "refine_iters": 1},
        {"preset": "nonstandard"},
    ],
    ids=["static", "protect", "auto", "low-rank", "low-memory", "blockwise", "nonstandard"],
)
def test_blocks_at_once_go_with_other_options(chain: Path, options: dict[str, Any]) -> None:
    pattern = r"conv_(in|out)|mid_block\.resnets\.0"
    found = distilled(chain, "x.safetensors", iters=2, parallel_blocks=True, blocks=pattern, **options)
    assert {len(pair) for pair in found.manifest.metrics.as_read["repair_block_loss"].values()} == {2}


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"parallel_blocks": True, "method": "lsq"}, "--parallel-blocks"),
        ({"parallel_blocks": True, "method": "adaround"}, "--parallel-blocks"),
        ({"parallel_blocks": True, "preset": "paper"}, "--parallel-blocks"),
        ({"repair_iters": 3}, "--repair-iters"),
    ],
)
def test_what_blocks_at_once_do_not_go_with_is_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError) as raised:
        DistillOptions(**options)
    assert raised.value.where == where

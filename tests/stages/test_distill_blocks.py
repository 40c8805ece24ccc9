"""`distill --blocks`: only the blocks asked for are trained."""

from __future__ import annotations

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

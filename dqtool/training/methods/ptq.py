"""`ptq`: quantizers set from the calibration, nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from dqtool.errors import UsageError
from dqtool.training.methods import Method
from dqtool.training.options import BkdOptions

if TYPE_CHECKING:
    from dqtool.training.data import Bars, Problem


def train(problem: Problem, options: BkdOptions, bars: Bars) -> dict[str, Any]:
    """Nothing."""
    return {}


def settle(options: BkdOptions, given: Mapping[str, Any]) -> BkdOptions:
    """No iterations.

    Raises:
        UsageError: some are asked for.
    """
    if given.get("iters") or given.get("refine_iters"):
        raise UsageError("--method ptq trains nothing", where="--iters, --refine-iters", fix="Leave them out")
    return replace(options, iters=0, refine_iters=0)


METHOD = Method(
    "ptq", "calibrated only", BkdOptions, train, lambda _options, _blocks: "none", by_blocks=True, settle=settle
)

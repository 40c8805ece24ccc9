"""`ptq`: quantizers set from the calibration, nothing trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dqtool.errors import UsageError
from dqtool.training.methods import Method

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


@dataclass(frozen=True)
class PtqOptions:
    """No iterations; those of other methods' options that say how many there are, so that none can be asked for."""

    iters: int = 0
    refine_iters: int = 0
    batch_size: int = 0


def train(task: DistillationTask, options: PtqOptions, bars: Bars) -> dict[str, Any]:
    """Nothing."""
    return {}


def derive_options(_options: PtqOptions, given: Mapping[str, Any]) -> PtqOptions:
    """No iterations.

    Raises:
        UsageError: some are asked for.
    """
    if given.get("iters") or given.get("refine_iters"):
        raise UsageError("--method ptq trains nothing", where="--iters, --refine-iters", fix="Leave them out")
    return PtqOptions()


METHOD = Method(
    "ptq", "calibrated only", PtqOptions, train, lambda _options, _blocks: "none", by_blocks=True, derive=derive_options
)

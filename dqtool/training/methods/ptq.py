"""`ptq`: quantizers initialised by the calibration, without training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.errors import UsageError
from dqtool.training.methods import Method

if TYPE_CHECKING:
    from dqtool.training.data import Bars, DistillationTask


@dataclass(frozen=True)
class PtqOptions:
    """Iteration counts of other methods, all 0, so that a request for iterations can be refused."""

    iters: int = 0
    refine_iters: int = 0
    batch_size: int = 0


def train(task: DistillationTask, options: PtqOptions, bars: Bars) -> dict[str, Json]:
    """Return no metrics: nothing is trained."""
    return {}


def derive_options(_options: PtqOptions, given: JsonObject) -> PtqOptions:
    """Return options without iterations.

    Raises:
        UsageError: iterations are requested.
    """
    if given.get("iters") or given.get("refine_iters"):
        raise UsageError("--method ptq trains nothing", where="--iters, --refine-iters", fix="Leave out both options")
    return PtqOptions()


METHOD = Method(
    "ptq", "calibrated only", PtqOptions, train, lambda _options, _blocks: "none", by_blocks=True, derive=derive_options
)

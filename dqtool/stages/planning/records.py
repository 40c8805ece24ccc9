"""Records of dry runs: what a stage would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.artifacts.schema import Record

if TYPE_CHECKING:
    from dqtool.nn.assignment import LayerPlan

__all__ = ["PlannedLayer"]


@dataclass(frozen=True)
class PlannedLayer(Record):
    """A layer of a plan: the shape of its weight, its bits and its multiply-accumulates for one sample."""

    name: str
    shape: tuple[int, ...]
    bits: tuple[int, int] | None
    macs: int
    kind: str | None = None
    low_rank: int = 0

    @classmethod
    def of(cls, plan: LayerPlan) -> PlannedLayer:
        """Return the record of a layer whose bits were assigned."""
        info = plan.info
        return cls(info.name, info.shape, plan.bits.widths, info.macs, info.kind, plan.low_rank)

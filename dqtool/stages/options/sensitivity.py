"""Options of `dqtool sensitivity`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from dqtool.core.bits import LayerBits, parse_bits
from dqtool.stages.options.declared import Option
from dqtool.stages.options.shared import ARTIFACT, OUTPUT

__all__ = ["SensitivityOptions"]


@dataclass(frozen=True)
class SensitivityOptions:
    """Options of `dqtool sensitivity`."""

    artifact: Annotated[str | None, ARTIFACT] = None
    output: Annotated[str, OUTPUT] = "sensitivity.json"
    bits: Annotated[str, Option("Bits of weights and activations to judge, 2 to 8 each.", "W/A")] = "4/4"
    passes: Annotated[
        int, Option("Backward passes to average. More give steadier figures and take longer.", "N", least=1)
    ] = 32
    top: Annotated[int, Option("Operands to print, costliest first. The report holds all.", "N", least=1)] = 20

    def __post_init__(self) -> None:
        """Raise `UsageError` for bits that don't exist."""
        _ = self.layer_bits

    @cached_property
    def layer_bits(self) -> LayerBits:
        """`bits`, parsed."""
        return parse_bits(self.bits)

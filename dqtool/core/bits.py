"""Bit widths as users write them. No torch, so that a bad `--bits` is refused at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dqtool.errors import UsageError

__all__ = ["FLOAT_BITS", "LayerBits", "parse_bits", "parse_keep"]

FLOAT_BITS = 16
"""From this width on, an operand stays in float."""


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weights and of its input; `FLOAT_BITS` and more mean float."""

    weight: int
    input: int

    @property
    def quantizes_weight(self) -> bool:
        """Whether weights are on an integer grid."""
        return self.weight < FLOAT_BITS

    @property
    def quantizes_input(self) -> bool:
        """Whether the input is on an integer grid."""
        return self.input < FLOAT_BITS


def parse_bits(text: str, where: str = "--bits") -> LayerBits:
    """`"W/A"` with each of 2..8 or 16 (float), e.g. `4/4`, `8/8`, `4/16` (weight-only).

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    allowed = (*range(2, 9), FLOAT_BITS)
    if not match or int(match[1]) not in allowed or int(match[2]) not in allowed:
        raise UsageError(
            f"'{text}' is not a bit width",
            where=where,
            fix="Give weight and activation bits as W/A, each 2 to 8, or 16 for float: 4/4, 6/6, 8/8, 4/16",
        )
    return LayerBits(int(match[1]), int(match[2]))


def parse_keep(text: str) -> tuple[str, LayerBits]:
    """`"REGEX=W/A"`: the layers whose full name matches, and their bits.

    Raises:
        UsageError: no `=`, bits that don't exist, or no regular expression.
    """
    pattern, equals, bits = text.rpartition("=")
    if not equals or not pattern:
        raise UsageError(f"'{text}' is not of the form REGEX=W/A", where="--keep", fix="Example: --keep 'conv_in=8/8'")
    try:
        re.compile(pattern)
    except re.error as e:
        raise UsageError(f"'{pattern}' is not a regular expression: {e}", where="--keep") from e
    return pattern, parse_bits(bits, "--keep")

"""Bit widths of a whole network, parsed once at the command line and handed on. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dqtool.core.bits import FLOAT_BITS, AttentionBits, Bits, LayerBits, check_width, parse_bits
from dqtool.errors import UsageError

__all__ = ["PRESETS", "KeptLayers", "QuantizationSpec"]

END_BITS = 8
"""Least bits of the layers that read the network's input or produce its output."""

SOFTMAX_BITS = 8
"""Default bits of the softmax output."""

STANDARD, NONSTANDARD, PAPER = "standard", "nonstandard", "paper"
PRESETS = (STANDARD, NONSTANDARD, PAPER)
"""`standard` quantizes every layer and both attention products, with one activation scale for each layer and step.

`nonstandard` keeps in float what EfficientDM keeps in float: convolutions after an upsampling, skip connections and the
attention products. QuEST's 4-bit scheme with one activation scale for each in-channel is not offered, since an integer
product can't factor such scales out of its sum (App. I of arXiv 2409.14307).

`paper` has the layers of `standard`; `distill` then trains block by block alone, as the paper does (Eq. 25-27).
"""


@dataclass(frozen=True)
class KeptLayers:
    """Layers with bits of their own (`--keep REGEX=W/A`): those whose full name matches `pattern`."""

    pattern: str
    bits: LayerBits

    @classmethod
    def parse(cls, text: str) -> KeptLayers:
        """Parse `"REGEX=W/A"`.

        Raises:
            UsageError: the text has no `=`, the bits are not offered, or the pattern is not a regular expression.
        """
        pattern, equals, bits = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(
                f"'{text}' is not of the form REGEX=W/A", where="--keep", fix="Example: --keep 'conv_in=8/8'"
            )
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as e:
            raise UsageError(f"'{pattern}' is not a regular expression: {e}", where="--keep") from e
        return cls(pattern, parse_bits(bits, "--keep"))

    def matches(self, name: str) -> bool:
        """Return whether the whole of a layer's name matches the pattern."""
        return re.fullmatch(self.pattern, name) is not None

    def __str__(self) -> str:
        return f"{self.pattern}={self.bits}"


@dataclass(frozen=True)
class QuantizationSpec:
    """Bits of every layer of a network.

    Attributes:
        bits: bits of all layers without an entry below; the network's first and last layers get at least 8/8.
        softmax: bits of the softmax output of attention modules whose other operands are quantized.
        kept: layers with bits of their own; the last matching entry wins.
        preset: name in `PRESETS`.
        float_layers: names of the layers that the preset keeps in float.
    """

    bits: LayerBits
    softmax: int = SOFTMAX_BITS
    kept: tuple[KeptLayers, ...] = ()
    preset: str = "standard"
    float_layers: tuple[str, ...] = ()

    @classmethod
    def parse(
        cls, bits: str, keep: Iterable[str] = (), softmax_bits: int = SOFTMAX_BITS, preset: str = "standard"
    ) -> QuantizationSpec:
        """Parse the command line's `--bits`, `--keep`, `--softmax-bits` and `--preset`.

        Raises:
            UsageError: one of them is not offered.
        """
        if preset not in PRESETS:
            raise UsageError(f"unknown preset '{preset}'", where="--preset", fix=f"Choose from {', '.join(PRESETS)}")
        check_width(softmax_bits, "--softmax-bits")
        return cls(parse_bits(bits), softmax_bits, tuple(map(KeptLayers.parse, keep)), preset)

    def leaving_float(self, names: Sequence[str]) -> QuantizationSpec:
        """Return this spec with `names` as the layers that the preset keeps in float."""
        return replace(self, float_layers=tuple(names))

    def layer_bits(self, name: str, kind: str, is_end: bool) -> Bits:
        """Return the bits of one layer; `is_end` marks the first and last layers of the network."""
        bits = self.bits
        if is_end:
            bits = LayerBits(max(bits.weight, END_BITS), max(bits.input, END_BITS))
        if name in self.float_layers:
            bits = LayerBits(FLOAT_BITS, FLOAT_BITS)
        for kept in self.kept:
            if kept.matches(name):
                bits = kept.bits
        if kind != "attention":
            return bits
        return AttentionBits(bits.input, FLOAT_BITS if bits.input >= FLOAT_BITS else self.softmax)

    def check_names(self, names: Iterable[str]) -> None:
        """Check that every pattern of `kept` matches a layer of the network.

        Raises:
            UsageError: a pattern matches none of `names`.
        """
        names = list(names)
        for kept in self.kept:
            if not any(map(kept.matches, names)):
                raise UsageError(
                    f"'{kept.pattern}' matches no layer.",
                    where="--keep",
                    fix="`dqtool inspect` lists the names of all layers",
                )

    def to_json(self) -> dict[str, Any]:
        """Return the parameters `bits`, `keep` and `softmax_bits` of a manifest.

        `keep` includes the layers that the preset keeps in float.
        """
        floats = [f"{re.escape(name)}={FLOAT_BITS}/{FLOAT_BITS}" for name in self.float_layers]
        return {
            "bits": str(self.bits),
            "keep": [*floats, *map(str, self.kept)],
            "softmax_bits": self.softmax,
        }

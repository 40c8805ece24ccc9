"""The bits of a whole network, as a user asks for them: parsed once at the command line and handed on. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dqtool.core.bits import FLOAT_BITS, AttentionBits, Bits, LayerBits, check_width, parse_bits
from dqtool.errors import UsageError

__all__ = ["PRESETS", "KeptLayers", "QuantizationSpec"]

END_BITS = 8
"""Least bits of the layers that read the network's raw input or produce its output."""

SOFTMAX_BITS = 8

PRESETS = ("standard", "nonstandard")
"""`standard` quantizes every layer and both attention products, with one activation scale a layer (and step). `nonstandard`
keeps what EfficientDM keeps in float: convolutions after an upsampling, skip connections and the attention products. QuEST's
way at 4 bits, a scale for each in-channel of the activations, is not offered: no integer product can take such scales out of
its sum (App. I of arXiv 2409.14307)."""


@dataclass(frozen=True)
class KeptLayers:
    """Layers at bits of their own (`--keep REGEX=W/A`): those whose full name matches `pattern`."""

    pattern: str
    bits: LayerBits

    @classmethod
    def parse(cls, text: str) -> KeptLayers:
        """Parse `"REGEX=W/A"`.

        Raises:
            UsageError: there is no `=`, the bits don't exist, or the pattern is no regular expression.
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
        """Say whether a layer of this name is one of them."""
        return re.fullmatch(self.pattern, name) is not None

    def __str__(self) -> str:
        return f"{self.pattern}={self.bits}"


@dataclass(frozen=True)
class QuantizationSpec:
    """The bits of every layer: `bits` for all, except the network's two ends (8/8 at least), what a preset leaves in float
    (`float_layers`, by name) and what `kept` names, of which the last match wins.

    `softmax` are the bits of the attention's softmax output, where its other operands are quantized.
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
        """Return this spec with `names` as the layers that the preset leaves in float."""
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
        """Refuse a pattern of `kept` that matches none of a network's layers.

        Raises:
            UsageError: there is one.
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
        """Return the parameters `bits`, `keep` and `softmax_bits` of a manifest; what a preset leaves in float is part of
        `keep`."""
        floats = [f"{re.escape(name)}={FLOAT_BITS}/{FLOAT_BITS}" for name in self.float_layers]
        return {
            "bits": str(self.bits),
            "keep": [*floats, *map(str, self.kept)],
            "softmax_bits": self.softmax,
        }

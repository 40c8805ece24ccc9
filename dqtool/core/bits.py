"""Bit widths of the operands of layers and attention modules. Needs no torch, so that a bad `--bits` fails at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dqtool.errors import UsageError

if TYPE_CHECKING:  # `dqtool --help` parses no records.
    from dqtool.artifacts.records import LayerRecord

__all__ = [
    "FLOAT_BITS",
    "AttentionBits",
    "Bits",
    "LayerBits",
    "bits_from_json",
    "bits_label",
    "check_width",
    "parse_bits",
]

FLOAT_BITS = 16
"""Least width that means float."""

WIDTHS = (*range(2, 9), FLOAT_BITS)


@dataclass(frozen=True)
class LayerBits:
    """Bits of a layer's weight and of its input; `FLOAT_BITS` or more means float."""

    weight: int
    input: int

    @property
    def quantizes_weight(self) -> bool:
        """Return whether the weight is quantized."""
        return self.weight < FLOAT_BITS

    @property
    def quantizes_input(self) -> bool:
        """Return whether the input is quantized."""
        return self.input < FLOAT_BITS

    def operations(self, macs: int) -> int:
        """Return the bit operations of `macs` multiply-accumulates, `macs · b_w · b_a`."""
        return macs * _cost(self.weight) * _cost(self.input)

    @property
    def widths(self) -> tuple[int, int]:
        """Return (weight, input), the form that manifests hold."""
        return self.weight, self.input

    def to_json(self) -> list[int]:
        """Return the widths as JSON."""
        return list(self.widths)

    def __str__(self) -> str:
        return f"{self.weight}/{self.input}"


@dataclass(frozen=True)
class AttentionBits:
    """Bits of the operands of an attention module's two products, `q·kᵀ` and `softmax·v`.

    `qkv` is the width of q, k and v; `softmax` is the width of the softmax output. `FLOAT_BITS` or more means float.
    """

    qkv: int
    softmax: int

    def of(self, operand: str) -> int:
        """Return the bits of "q", "k", "v" or "probs" (the softmax output)."""
        return self.softmax if operand == "probs" else self.qkv

    def operations(self, macs: int) -> int:
        """Return the bit operations of both products, which have half of `macs` each."""
        qkv = _cost(self.qkv)
        return macs // 2 * qkv * (qkv + _cost(self.softmax))

    @property
    def widths(self) -> tuple[int, int]:
        """Return (softmax, qkv), the form that manifests hold."""
        return self.softmax, self.qkv

    def to_json(self) -> list[int]:
        """Return the widths as JSON."""
        return list(self.widths)

    def __str__(self) -> str:
        return f"{self.softmax}/{self.qkv}"


Bits = LayerBits | AttentionBits


def bits_from_json(kind: str, widths: Sequence[int]) -> Bits:
    """Return the bits that `to_json` wrote for a layer of this kind ("attention" or any other)."""
    first, second = widths
    return AttentionBits(qkv=second, softmax=first) if kind == "attention" else LayerBits(first, second)


def check_width(bits: int, where: str) -> int:
    """Return `bits`.

    Raises:
        UsageError: `bits` is neither 2 to 8 nor 16, which means float.
    """
    if bits not in WIDTHS:
        raise UsageError(f"{bits} bits are not offered", where=where, fix="Give 2 to 8, or 16 for float")
    return bits


def parse_bits(text: str, where: str = "--bits") -> LayerBits:
    """Parse `"W/A"`, each of 2..8 or 16 (float): `4/4`, `8/8`, `4/16` (weight-only).

    Raises:
        UsageError: the text has another form.
    """
    match = re.fullmatch(r"(\d{1,2})/(\d{1,2})", text.strip())
    if not match or int(match[1]) not in WIDTHS or int(match[2]) not in WIDTHS:
        raise UsageError(
            f"'{text}' is not a bit width",
            where=where,
            fix="Give weight and activation bits as W/A, each 2 to 8, or 16 for float: 4/4, 6/6, 8/8, 4/16",
        )
    return LayerBits(int(match[1]), int(match[2]))


def _cost(bits: int) -> int:
    """Return the width that an operand counts as in bit operations; float operands count as float32."""
    return 32 if bits >= FLOAT_BITS else bits


def bits_label(layers: Iterable[LayerRecord]) -> str:
    """Return the bits of most multiply-accumulates of a model, such as `4/4`; `float` before distillation."""
    weight: dict[str, int] = {}
    for layer in layers:
        if layer.bits is not None and layer.kind != "attention" and min(layer.bits) < FLOAT_BITS:
            key = "/".join(map(str, layer.bits))
            weight[key] = weight.get(key, 0) + layer.macs
    return max(weight, key=lambda key: weight[key]) if weight else "float"

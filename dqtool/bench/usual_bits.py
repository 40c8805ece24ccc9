"""Bits of a network's layers, in one phrase."""

from __future__ import annotations

from collections.abc import Sequence

from dqtool.artifacts.records import LayerRecord

__all__ = ["usual_bits"]


def usual_bits(layers: Sequence[LayerRecord]) -> str:
    """Return the bits of most layers, as `W/A`."""
    counts: dict[str, int] = {}
    for layer in layers:
        if layer.kind != "attention" and layer.bits is not None:
            bits = "/".join(map(str, layer.bits))
            counts[bits] = counts.get(bits, 0) + 1
    return max(counts, key=lambda bits: counts[bits], default="no quantized layers")

"""What a quantized model costs: bit operations and bytes on disk (App. B of arXiv 2409.14307), in plain integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dqtool.artifacts.header import file_header

__all__ = ["bops", "bops_ratio", "file_bytes", "size_ratio"]

FLOAT_BITS = 32
STAYS_FLOAT = 16  # widths from here on are not quantized


def bops(layers: Iterable[Mapping[str, Any]]) -> int:
    """Bit operations `Σ macs · b_w · b_a` of layers `{"kind": str, "macs": int, "bits": [w, a]}`.

    `bits` None, and widths from 16 on (operands that stay float32), count 32. A layer of kind "attention" stands for
    both products, half of its MACs each, with bits (softmax output, q·k·v): `q·kᵀ` costs `a·a`, `softmax·v` `w·a`. MACs are
    those of one forward pass at the batch size they were counted for.
    """
    total = 0
    for layer in layers:
        weight, activation = (
            FLOAT_BITS if bits is None or bits >= STAYS_FLOAT else bits for bits in layer["bits"] or (None, None)
        )
        if layer.get("kind") == "attention":
            total += layer["macs"] // 2 * activation * (weight + activation)
        else:
            total += layer["macs"] * weight * activation
    return total


def bops_ratio(layers: Sequence[Mapping[str, Any]]) -> float:
    """How many times fewer bit operations than the same layers in float32; 1 for a model without any."""
    quantized = bops(layers)
    return sum(layer["macs"] for layer in layers) * FLOAT_BITS**2 / quantized if quantized else 1.0


def file_bytes(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> int:
    """Exact size of the safetensors file that holds `{name: (dtype, shape)}`.

    8 bytes of length, a JSON header filled up to a multiple of 8, the data. A dtype goes by its name in safetensors
    (`F32`) or in torch (`float32`, `torch.float32`). `metadata` defaults to `{"format": "pt"}`; an empty one leaves the
    entry out. Raises `ValueError` for a dtype that is unknown.
    """
    header, _, data = file_header(tensors, metadata)
    return len(header) + data


def size_ratio(before: int, after: int) -> float:
    """How many times smaller `after` bytes are than `before`."""
    return before / after if after else float("inf")

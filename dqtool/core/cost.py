"""What a quantized model costs: bit operations and bytes on disk (App. B of arXiv 2409.14307), in plain integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dqtool.artifacts.header import file_header
from dqtool.core.bits import bits_from_json

__all__ = ["bops", "bops_ratio", "file_bytes", "size_ratio"]


def bops(layers: Iterable[Mapping[str, Any]]) -> int:
    """Return the bit operations of layers `{"kind": str, "macs": int, "bits": [...]}`, as manifests list them.

    `bits` are those of `Bits.to_json`; None, and widths from 16 on (operands that stay float32), count 32. A layer of kind
    "attention" stands for both products, half of its MACs each. MACs are those of one forward pass at the batch size
    that they were counted for.
    """
    total = 0
    for layer in layers:
        widths = [32 if width is None else width for width in layer["bits"] or (None, None)]
        total += bits_from_json(layer.get("kind", "linear"), widths).operations(layer["macs"])
    return total


def bops_ratio(layers: Sequence[Mapping[str, Any]]) -> float:
    """How many times fewer bit operations than the same layers in float32; 1 for a model without any."""
    quantized = bops(layers)
    return sum(layer["macs"] for layer in layers) * 32**2 / quantized if quantized else 1.0


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

"""What a quantized model costs: bit operations and bytes on disk (App. B of arXiv 2409.14307), in plain integers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

__all__ = ["bops", "bops_ratio", "file_bytes", "size_ratio"]

FLOAT_BITS = 32
STAYS_FLOAT = 16  # widths from here on are not quantized

# safetensors' names and bits per element, in the order of its `Dtype` enumeration, by which it sorts a file's tensors.
DTYPES = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
TORCH_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}


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
    metadata = {"format": "pt"} if metadata is None else metadata
    order = {name: rank for rank, name in enumerate(DTYPES)}
    entries = [(_dtype(dtype), name, list(shape)) for name, (dtype, shape) in tensors.items()]
    entries.sort(key=lambda entry: (-order[entry[0]], entry[1]))
    # The offsets stand in the header as decimal numbers, so its length depends on the order of the tensors.
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for dtype, name, shape in entries:
        start, end = end, end + prod(shape) * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + end


def size_ratio(before: int, after: int) -> float:
    """How many times smaller `after` bytes are than `before`."""
    return before / after if after else float("inf")


def _dtype(name: str) -> str:
    known = TORCH_DTYPES.get(name.removeprefix("torch."), name)
    if known not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    return known

"""The header of a safetensors file as the library writes it, without torch and without tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NotRequired, TypedDict

__all__ = ["DTYPES", "METADATA", "TORCH_DTYPES", "TensorEntry", "file_header"]


class TensorEntry(TypedDict):
    """A tensor in the header of a safetensors file: dtype by its name there, shape, and the place of its bytes."""

    dtype: str
    shape: list[int]
    data_offsets: NotRequired[list[int]]


METADATA = {"format": "pt"}
"""One key only: the library writes several in no fixed order."""

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


def file_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, list[str], int]:
    """Return the header of a safetensors file with the tensors `{name: (dtype, shape)}`, their order in it, and the number
    of bytes of data.

    8 bytes of length and a JSON header filled up to a multiple of 8. A dtype has its name in safetensors (`F32`) or
    in torch (`float32`, `torch.float32`). `metadata` defaults to `{"format": "pt"}`; an empty one writes no such entry.
    Raises `ValueError` for a dtype that is unknown.
    """
    metadata = METADATA if metadata is None else metadata
    order = {name: rank for rank, name in enumerate(DTYPES)}
    entries = [(_dtype(dtype), name, list(shape)) for name, (dtype, shape) in tensors.items()]
    entries.sort(key=lambda entry: (-order[entry[0]], entry[1]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for dtype, name, shape in entries:
        start, end = end, end + prod(shape) * DTYPES[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, [name for _, name, _ in entries], end


def _dtype(name: str) -> str:
    known = TORCH_DTYPES.get(name.removeprefix("torch."), name)
    if known not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    return known

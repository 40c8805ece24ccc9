"""The constants of a frozen TensorFlow graph (`.pb`), read without TensorFlow.

A GraphDef is protocol buffers: fields of (number << 3 | wire type). Only what constants need is followed:
GraphDef.node = 1; NodeDef.name = 1, op = 2, attr = 5 (a map: key = 1, value = 2); AttrValue.tensor = 8;
TensorProto.dtype = 1, tensor_shape = 2, tensor_content = 4, float_val = 5; TensorShapeProto.dim = 2; Dim.size = 1.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

__all__ = ["graph_constants"]

_FLOAT = 1  # DataType.DT_FLOAT


def graph_constants(data: bytes) -> dict[str, np.ndarray]:
    """Name to array (float32) of every float constant. Raises `ValueError` for bytes that are no GraphDef."""
    constants = {}
    for number, node in _fields(memoryview(data)):
        if number != 1 or isinstance(node, int):
            continue
        name, is_constant, tensor = "", False, None
        for field, value in _fields(node):
            if isinstance(value, int):
                continue
            if field == 1:
                name = bytes(value).decode("utf-8")
            elif field == 2:
                is_constant = value == b"Const"
            elif field == 5:
                entry = dict(_fields(value))
                if entry.get(1) == b"value" and not isinstance(entry.get(2, 0), int):
                    tensor = dict(_fields(entry[2])).get(8)  # type: ignore[arg-type]
        if is_constant and tensor is not None and not isinstance(tensor, int):
            array = _array(tensor)
            if array is not None:
                constants[name] = array
    if not constants:
        raise ValueError("no float constants in this graph")
    return constants


def _array(tensor: memoryview) -> np.ndarray | None:
    """The array of a TensorProto; None for other types than float32."""
    kind: int | memoryview = 0
    shape: list[int] = []
    content: np.ndarray | None = None
    values: list[np.ndarray] = []
    for field, value in _fields(tensor):
        if field == 1:
            kind = value
        elif field == 2 and not isinstance(value, int):
            for inner, dim in _fields(value):
                if inner == 2 and not isinstance(dim, int):
                    shape.append(next((int(size) for key, size in _fields(dim) if key == 1), 0))  # type: ignore[arg-type]
        elif field == 4 and not isinstance(value, int):
            content = np.frombuffer(value, dtype="<f4")
        elif field == 5 and not isinstance(value, int):  # packed, or one at a time with wire type 5
            values.append(np.frombuffer(value, dtype="<f4"))
    if kind != _FLOAT:
        return None
    flat = content if content is not None else np.concatenate(values) if values else np.zeros(0, "<f4")
    size = int(np.prod(shape))
    if len(flat) != size:
        if len(flat) != 1:
            raise ValueError(f"a tensor of shape {shape} with {len(flat)} values")
        flat = np.full(size, flat[0])  # a constant array is stored as one value
    return flat.reshape(shape)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of a message: varints as int, everything else as its bytes."""
    place, end = 0, len(data)
    while place < end:
        tag, place = _varint(data, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(data, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = _varint(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} is none of a GraphDef")
        if place + size > end:
            raise ValueError("the file ends in the middle of a field")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data) or shift > 63:
            raise ValueError("a damaged number")
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, place

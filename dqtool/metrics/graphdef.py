"""Reader of the constants of a frozen TensorFlow graph (`.pb`), without TensorFlow.

A GraphDef is a protocol buffer, with fields of (number << 3 | wire type). Only the fields of constants are read:
GraphDef.node = 1; NodeDef.name = 1, op = 2, attr = 5 (a map: key = 1, value = 2); AttrValue.tensor = 8;
TensorProto.dtype = 1, tensor_shape = 2, tensor_content = 4, float_val = 5; TensorShapeProto.dim = 2; Dim.size = 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import numpy as np

__all__ = ["graph_constants"]

_FLOAT = 1  # DataType.DT_FLOAT
_FIELDS = 500_000  # FID's graph has 1,008 nodes of some ten fields
_VALUES = 1 << 25  # FID's graph has 23.9 million


def graph_constants(data: bytes) -> dict[str, np.ndarray]:
    """Return every float constant by name as a float32 array.

    Raises:
        ValueError: the bytes are not a GraphDef, or it has more nodes or values than Inception.
    """
    constants: dict[str, np.ndarray] = {}
    values = 0
    budget = iter(range(_FIELDS))
    for number, node in _fields(memoryview(data), budget):
        if number != 1 or isinstance(node, int):
            continue
        name, is_constant, tensor = "", False, None
        for field, value in _fields(node, budget):
            if isinstance(value, int):
                continue
            if field == 1:
                name = bytes(value).decode("utf-8")
            elif field == 2:
                is_constant = bytes(value) == b"Const"
            elif field == 5:
                entry = dict(_fields(value, budget))
                if entry.get(1) == memoryview(b"value") and not isinstance(entry.get(2, 0), int):
                    tensor = dict(_fields(entry[2], budget)).get(8)  # type: ignore[arg-type]
        if is_constant and tensor is not None and not isinstance(tensor, int):
            array = _array(tensor, _VALUES - values, budget)
            if array is not None:
                values += array.size
                constants[name] = array
    if not constants:
        raise ValueError("no float constants in this graph")
    return constants


def _array(tensor: memoryview, limit: int, budget: Iterator[int]) -> np.ndarray | None:
    """Return the array of a TensorProto with at most `limit` values; None if its type is not float32."""
    kind: int | memoryview = 0
    shape: list[int] = []
    content: np.ndarray | None = None
    values: list[np.ndarray] = []
    for field, value in _fields(tensor, budget):
        if field == 1:
            kind = value
        elif field == 2 and not isinstance(value, int):
            for inner, dim in _fields(value, budget):
                if inner == 2 and not isinstance(dim, int):
                    sizes = [size for key, size in _fields(dim, budget) if key == 1]
                    if not all(isinstance(size, int) for size in sizes):
                        raise ValueError("a dimension is not a number")
                    shape.append(int(sizes[0]) if sizes else 0)
        elif field == 4 and not isinstance(value, int):
            content = np.frombuffer(value, dtype="<f4")
        elif field == 5 and not isinstance(value, int):  # packed, or one at a time with wire type 5
            values.append(np.frombuffer(value, dtype="<f4"))
    if kind != _FLOAT:
        return None
    flat = content if content is not None else np.concatenate(values) if values else np.zeros(0, "<f4")
    size = prod(shape)
    if len(shape) > 8 or size > limit:
        raise ValueError(f"a tensor of {size} values, of which at most {limit} may follow")
    if len(flat) != size:
        if len(flat) != 1:
            raise ValueError(f"a tensor of shape {shape} with {len(flat)} values")
        flat = np.full(size, flat[0])  # a constant array is stored as one value
    return flat.reshape(shape)


def _fields(data: memoryview, budget: Iterator[int]) -> Iterator[tuple[int, int | memoryview]]:
    """Yield (field number, value) of a message: varints as int, other values as bytes. Each field uses up one of
    `budget`."""
    place, end = 0, len(data)
    while place < end:
        if next(budget, None) is None:
            raise ValueError(f"over {_FIELDS} fields")
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
            raise ValueError(f"a GraphDef has no wire type {kind}")
        if place + size > end:
            raise ValueError("the file ends in the middle of a field")
        yield tag >> 3, data[place : place + size]
        place += size


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """Return the variable-length integer at `place`, and the place after it."""
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

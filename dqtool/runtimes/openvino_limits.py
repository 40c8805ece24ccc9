"""Limits on an OpenVINO graph that comes from a file: what it may repeat, remember, and fold into constants."""

from __future__ import annotations

from math import prod
from typing import Any

from dqtool.errors import ArtifactError

__all__ = ["check_graph"]

REPEATING = ("If", "Loop", "TensorIterator", "ReadValue", "Assign")
"""Operations that run other graphs or keep a state between calls. No exported network holds one."""

GROWTH = 16
"""Bytes of a value computed from constants alone, per byte of the weights' file. Two weights of 4 bits in a byte become 8 bytes."""

SMALL = 1 << 20
"""Bytes that a value computed from constants alone may have however small the weights' file is."""


def check_graph(model: Any, weights: int, where: str) -> None:
    """Refuse a graph that could run on without end or fold small constants into huge ones when it is compiled.

    Args:
        model: the `openvino.Model`, as read from a file and not compiled yet.
        weights: bytes of the file that holds its constants.
        where: the file's name, for the message.

    Raises:
        ArtifactError: the graph repeats or branches, or a value that depends on no input is over the limit.
    """
    limit = max(SMALL, GROWTH * weights)
    depends: set[str] = set()
    for operation in model.get_ordered_ops():
        kind, name = operation.get_type_name(), operation.get_name()
        if kind in REPEATING:
            raise ArtifactError(
                f"The graph holds an operation {kind}, which no exported network needs",
                where=where,
                fix="Export the model again with dqtool",
            )
        before = [value.get_source_output().get_node().get_name() for value in operation.inputs()]
        if kind == "Parameter" or not depends.isdisjoint(before):
            depends.add(name)
            continue
        for value in operation.outputs():
            shape, item = value.get_partial_shape(), value.get_element_type().size
            if shape.is_dynamic:
                continue
            size = item * prod(shape.to_shape())
            if size > limit:
                raise ArtifactError(
                    f"The graph computes {size:,} bytes from constants of {weights:,} bytes, with an operation {kind}",
                    where=where,
                    fix="Export the model again with dqtool",
                )

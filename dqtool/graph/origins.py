"""Follow named origins (inputs, layers, blocks) forward through a recording, to every operation that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dqtool.graph.recording import Op, Recording, storage_of, tensors_in

__all__ = ["follow_origins"]

Origins = frozenset[str]
NONE: Origins = frozenset()


def follow_origins(
    recording: Recording, starts: Mapping[str, Any], origin: Callable[[Op], str | None], nearest: bool
) -> dict[Op, Origins]:
    """Return the origins of each operation's arguments, for every operation that has some.

    `starts` are the initial origins, by name: tensors, alone or nested in lists. `origin` returns the name that the outputs of an operation get as an origin,
    or None for outputs that are none. With `nearest` a tensor has only its nearest origins; without, all origins that it
    was computed from.
    """
    known: dict[int, Origins] = {id(t): frozenset((name,)) for name, value in starts.items() for t in tensors_in(value)}
    written: dict[int, Origins] = {}

    def origins_of(tensor: Tensor) -> Origins:
        return known.get(id(tensor), NONE) | written.get(storage_of(tensor), NONE)

    found: dict[Op, Origins] = {}
    for op in recording.ops:
        read = NONE if _ignores_values(op) else NONE.union(*map(origins_of, tensors_in(op.args)))
        if read:
            found[op] = read
        name = origin(op)
        if op.module is not None and name is None:
            continue  # a mark changes no tensor
        made = read if name is None else frozenset((name,)) if nearest else read | {name}
        for tensor in op.outputs:
            known[id(tensor)] = made
            if op.mutates:  # views of the same memory see the change as well
                memory = storage_of(tensor)
                written[memory] = written.get(memory, NONE) | made
    return found


def _ignores_values(op: Op) -> bool:
    """Say whether an operation reads nothing of its arguments but their shape, as `zeros_like` and `new_zeros` do."""
    name = op.name.removeprefix("aten.").split(".")[0]
    return name.endswith("_like") or name.startswith("new_")

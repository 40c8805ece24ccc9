"""Results of a long loop, saved from time to time, so that an interrupted run loses half a minute of it at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from dqtool.distributed import world_size

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.artifacts.workspace import Workspace

__all__ = ["CallCheckpoints", "Checkpoints", "PieceStore"]

EVERY = 20.0
"""Seconds between two saves."""
CALL_BYTES = 1 << 30
"""Most bytes of the outputs that one iteration keeps for this purpose; what it makes after them is made again."""


class PieceStore(Protocol):
    """Storage of finished pieces, from which an interrupted run continues, such as a `Workspace`."""

    def load(self, key: str) -> Mapping[str, Tensor] | None:
        """Return the tensors saved under `key`, or None."""

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Save tensors under `key`."""

    def alone(self) -> PieceStore:
        """Return the storage of pieces that a process saves and loads without the others."""


class Checkpoints:
    """Saves what the iterations of one loop made, as pieces `NAME FIRST` of a workspace, each of several iterations.

    `found` holds the tensors of the iterations that an earlier run had saved, by iteration. The iterations of a loop are
    numbered from 0 and added in order.
    """

    def __init__(self, workspace: Workspace, name: str, every: float | None = None) -> None:
        self.workspace, self.name, self.every = workspace, name, EVERY if every is None else every
        self.found: dict[int, dict[str, Tensor]] = {}
        for key in workspace.keys():  # noqa: SIM118 (no dictionary)
            if key.startswith(f"{name} "):
                for full, tensor in (workspace.load(key) or {}).items():
                    index, _, inner = full.partition("/")
                    self.found.setdefault(int(index), {})[inner] = tensor
        whole = next(i for i in range(len(self.found) + 1) if i not in self.found)
        self.found = {
            index: self.found[index] for index in range(whole)
        }  # a damaged piece is made again, with all after it
        self._new: dict[str, Tensor] = {}
        self._first: int | None = None
        self._saved = time.monotonic()

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Take in what iteration `index` made; save it, with others since the last save, when it is time."""
        if self._first is None:
            self._first = index
        self._new |= {f"{index}/{name}": tensor for name, tensor in tensors.items()}
        if time.monotonic() - self._saved >= self.every:
            self.workspace.save(f"{self.name} {self._first}", self._new)
            self._new, self._first, self._saved = {}, None, time.monotonic()


class CallCheckpoints:
    """Saves the outputs of slow calls within one iteration of a loop, such as those of the network in one batch of a sampler.

    At the size of Stable Diffusion a batch takes an hour on a CPU. An interrupted iteration runs again, and what it had
    called is answered from the file, so that it comes to the same bits without the work. Only the iteration at hand is
    kept, up to `CALL_BYTES`. Saves take a tenth of the time, as long as they are not more than `2 * EVERY` apart. A name stands for calls of the same shapes: it holds the size of a batch.
    """

    def __init__(self, workspace: PieceStore, name: str, every: float | None = None) -> None:
        processes = world_size()  # a batch has as many parts
        name = name if processes == 1 else f"{name} by {processes} processes"
        self.workspace, self.key, self.every = workspace, f"calls of {name}", EVERY if every is None else every
        self._found: Mapping[str, Tensor] | None = None
        self._calls: dict[str, Tensor] = {}
        self._iteration, self._count, self._bytes = 0, 0, 0
        self._saved, self._cost = time.monotonic(), 0.0

    def begin(self, iteration: int) -> None:
        """Begin an iteration; its calls are numbered from 0."""
        self._iteration, self._count, self._calls, self._bytes = iteration, 0, {}, 0

    def output(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the output of the iteration's next call, which an earlier run may have saved (on the CPU)."""
        if self._found is None:
            self._found = self.workspace.load(self.key) or {}
        name = f"{self._iteration}/{self._count}"
        self._count += 1
        found = self._found.get(name)
        made = compute() if found is None else found
        self._bytes += made.nbytes
        if self._bytes > CALL_BYTES:
            self._calls.clear()
            return made
        self._calls[name] = made
        begin = time.monotonic()
        if found is None and begin - self._saved >= max(self.every, min(10 * self._cost, 2 * EVERY)):
            self.workspace.save(self.key, {key: value.detach().cpu() for key, value in self._calls.items()})
            self._saved = time.monotonic()
            self._cost = self._saved - begin if self.every else 0.0
        return made

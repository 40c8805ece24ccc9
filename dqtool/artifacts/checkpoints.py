"""Results of a long loop, saved from time to time, so that an interrupted run loses half a minute of it at most."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.artifacts.workspace import Workspace

__all__ = ["Checkpoints"]

EVERY = 20.0
"""Seconds between two saves."""


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

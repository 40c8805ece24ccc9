"""Tensors that are made when somebody asks for them and not kept: how a stage writes more than fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DeferredTensors"]


class DeferredTensors(MutableMapping[str, "torch.Tensor"]):
    """A dict of tensors of which some are functions: reading such an entry calls its function, every time.

    `save_tensors` asks for one after another, so that of all deferred entries one is in memory at a time.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._held: dict[str, torch.Tensor] = dict(tensors)
        self._made: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}

    def defer(self, name: str, like: torch.Tensor, make: Callable[[], torch.Tensor]) -> None:
        """Put `make()`, which must always give the same tensor, of `like`'s shape and dtype, under `name`."""
        self._held.pop(name, None)
        self._made[name] = (like, make)

    def like(self, name: str) -> torch.Tensor:
        """A tensor with the entry's shape and dtype, without making the entry."""
        return self._made[name][0] if name in self._made else self._held[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._made[name][1]() if name in self._made else self._held[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._made.pop(name, None)
        self._held[name] = tensor

    def __delitem__(self, name: str) -> None:
        del (self._made if name in self._made else self._held)[name]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._held, *self._made)

    def __len__(self) -> int:
        return len(self._held) + len(self._made)

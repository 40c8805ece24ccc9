"""Tensors that are made when somebody asks for them and not kept: how a stage writes more than fits into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DeferredTensors"]


class DeferredTensors(MutableMapping[str, "torch.Tensor"]):
    """A dict of tensors of which some are functions: reading such an entry calls its function, every time.

    `save_tensors` asks for one after another, so that of all deferred entries one is in memory at a time, or but a few
    rows of one that can be made row by row.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._held: dict[str, torch.Tensor] = dict(tensors)
        self._made: dict[str, tuple[torch.Tensor, Callable[[], torch.Tensor]]] = {}
        self._rows: dict[str, Callable[[slice], torch.Tensor]] = {}

    def defer(
        self,
        name: str,
        like: torch.Tensor,
        make: Callable[[], torch.Tensor],
        rows: Callable[[slice], torch.Tensor] | None = None,
    ) -> None:
        """Put `make()`, which must always give the same tensor, of `like`'s shape and dtype, under `name`.

        `rows(part)` is `make()[part]`, for a tensor that need not be made whole to be written.
        """
        self._forget(name)
        self._made[name] = (like, make)
        if rows is not None:
            self._rows[name] = rows

    def pieces(self, name: str, size: int) -> Iterator[torch.Tensor]:
        """Yield the entry in runs of rows of about `size` bytes (at least a row), one at a time, or whole if it can't be split."""
        if name not in self._rows:
            yield self[name]
            return
        like, rows = self.like(name), self._rows[name]
        step = max(1, size // max(1, like[0].numel() * like.element_size()))
        for start in range(0, len(like), step):
            yield rows(slice(start, start + step))

    def like(self, name: str) -> torch.Tensor:
        """Return a tensor with the entry's shape and dtype, without making the entry."""
        return self._made[name][0] if name in self._made else self._held[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._made[name][1]() if name in self._made else self._held[name]

    def __setitem__(self, name: str, tensor: torch.Tensor) -> None:
        self._forget(name)
        self._held[name] = tensor

    def __delitem__(self, name: str) -> None:
        if name not in self:
            raise KeyError(name)
        self._forget(name)

    def __iter__(self) -> Iterator[str]:
        yield from (*self._held, *self._made)

    def __len__(self) -> int:
        return len(self._held) + len(self._made)

    def __contains__(self, name: object) -> bool:
        return name in self._held or name in self._made

    def _forget(self, name: str) -> None:
        for where in (self._held, self._made, self._rows):
            where.pop(name, None)

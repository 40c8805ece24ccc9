"""Tensors of all samples that need not stay in memory: past a budget they live in mapped temporary files."""

from __future__ import annotations

import errno
import os
import tempfile

import torch
from torch import Tensor

from dqtool.errors import EnvironmentFault

__all__ = ["TensorStore"]


class TensorStore:
    """Tensors of all samples, `[N, ...]`, in memory or, past the budget, in mapped temporary files.

    A file has no name once it is mapped, so that its space is free again when its tensor is. Its room on the disk is taken
    before anything is written: a mapped file that finds the disk full would end the process.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self.used = 0
        self._spilled: set[int] = set()

    def empty(self, samples: int, like: Tensor) -> Tensor:
        """Room for `samples` rows shaped like `like[0]`.

        Raises:
            EnvironmentFault: the disk has no such room.
        """
        shape = torch.Size((samples, *like.shape[1:]))
        size = shape.numel() * like.element_size()
        if self.used + size <= self.budget:
            self.used += size
            return torch.empty(shape, dtype=like.dtype)
        with tempfile.TemporaryDirectory(prefix="dqtool-") as folder:
            path = os.path.join(folder, "tensor")
            _allocate(path, size)
            spilled = torch.from_file(path, shared=True, size=shape.numel(), dtype=like.dtype).view(shape)
        self._spilled.add(spilled.data_ptr())
        return spilled

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor `[N, ...]` where this store has room for it.

        Raises:
            EnvironmentFault: the disk has none.
        """
        kept = self.empty(len(tensor), tensor)
        return kept.copy_(tensor)

    def forget(self, tensor: Tensor) -> None:
        """A stored tensor is no longer used: drop the last reference to it after this."""
        if tensor.data_ptr() in self._spilled:
            self._spilled.remove(tensor.data_ptr())
        else:
            self.used -= tensor.numel() * tensor.element_size()


def _allocate(path: str, size: int) -> None:
    """A file of `size` bytes that the disk has room for."""
    try:
        with open(path, "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that can't say
            return
        raise EnvironmentFault(
            f"Activations that blocks read need {size / 1e6:.0f} MB more than the disk gives: {e.strerror}",
            where=os.path.dirname(os.path.dirname(path)),
            fix="Point TMPDIR at a larger disk, keep more of them in memory with --cache-memory, or take fewer --samples",
        ) from e

"""Storage of large tensors of all samples: in memory up to a budget, beyond it in mapped temporary files."""

from __future__ import annotations

import errno
import os
import tempfile

import torch
from torch import Tensor

from dqtool.errors import EnvironmentFault

__all__ = ["TensorStore"]


class TensorStore:
    """Allocates tensors `[N, ...]` of all samples in memory or, beyond the budget, in mapped temporary files.

    A file is unlinked once it is mapped, so its space is freed together with its tensor. Its disk space is allocated
    before anything is written, because writing to a mapped file on a full disk would kill the process.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget = budget_bytes
        self.used = 0
        self._spilled: set[int] = set()

    def empty(self, samples: int, like: Tensor) -> Tensor:
        """Allocate an uninitialised tensor of `samples` rows, each shaped like `like[0]`.

        Raises:
            EnvironmentFault: the disk is full.
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
        """Return a copy of the tensor `[N, ...]` in this store.

        Raises:
            EnvironmentFault: the disk is full.
        """
        kept = self.empty(len(tensor), tensor)
        return kept.copy_(tensor)

    def forget(self, tensor: Tensor) -> None:
        """Release the budget of a stored tensor; the caller must then drop its last reference."""
        if tensor.data_ptr() in self._spilled:
            self._spilled.remove(tensor.data_ptr())
        else:
            self.used -= tensor.numel() * tensor.element_size()


def _allocate(path: str, size: int) -> None:
    """Create a file of `size` bytes whose disk space is allocated.

    Raises:
        EnvironmentFault: the disk is full.
    """
    try:
        with open(path, "wb") as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system can't allocate in advance
            return
        raise EnvironmentFault(
            f"The disk has no room for {size / 1e6:.0f} MB of block activations: {e.strerror}",
            where=os.path.dirname(os.path.dirname(path)),
            fix="Point TMPDIR at a larger disk, raise --cache-memory to keep more in memory, or lower --samples",
        ) from e

"""How many threads PyTorch splits one operation over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["operation_threads"]


@contextmanager
def operation_threads(count: int, then: int | None = None) -> Iterator[None]:
    """While active, this thread's operations run on `count` threads; afterwards on `then` (default: as many as before).

    Several threads that each work on their own tensors with one thread an operation wait for nobody: operations that
    are split wait for the slowest part, which on a busy machine costs a multiple of the work.
    """
    import torch

    before = torch.get_num_threads() if then is None else then
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

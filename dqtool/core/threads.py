"""Number of threads that PyTorch splits one operation over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["operation_threads"]


@contextmanager
def operation_threads(count: int, then: int | None = None) -> Iterator[None]:
    """Run this thread's operations on `count` threads inside the context, and on `then` threads after it.

    `then` defaults to the number of threads before the context. Several Python threads that each work on their own
    tensors, with one thread for each operation, never wait for each other. An operation that is split waits for its
    slowest part, which costs a multiple of the work on a busy machine.
    """
    import torch

    before = torch.get_num_threads() if then is None else then
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

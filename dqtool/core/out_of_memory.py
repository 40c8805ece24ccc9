"""Going on with smaller batches where memory runs out."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

from dqtool import distributed, report
from dqtool.errors import EnvironmentFault

__all__ = ["is_out_of_memory", "with_smaller_batches"]

T = TypeVar("T")

SAID = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Texts of other errors of PyTorch where memory ran out: of the CPU's allocator, of CUDA itself, and of its library of products."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory ran out. PyTorch's own errors are known by name and text: it may not even be
    imported."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(text in str(error) for text in SAID))


def with_smaller_batches(
    work: Callable[[int], T], batch: int, what: str, smallest: int = 1, fix: str | None = None
) -> T:
    """Return `work(batch)`. Each time memory runs out, warn, free what is unused, and call it with half the batch.

    Raises:
        EnvironmentFault: memory runs out with `smallest` samples at a time.
    """
    while True:
        try:
            return work(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if distributed.world_size() > 1:  # the other processes are in the middle of their batch
                raise EnvironmentFault(
                    f"There is not enough memory for {what} with {batch} samples at a time",
                    where=f"process {distributed.rank()} of {distributed.world_size()}",
                    fix=fix or "Lower --batch-size, take fewer processes of a machine, or use a larger one",
                ) from None
            if batch <= smallest:
                raise EnvironmentFault(
                    f"There is not enough memory for {what}, even with {batch} samples at a time",
                    fix=fix
                    or "Free memory, use a larger machine, or give --device cpu where the device's memory ran out",
                ) from None
        batch = max(smallest, batch // 2)
        report.warn(f"memory ran out in {what}; it goes on with {batch} samples at a time")
        _free()


def _free() -> None:
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()

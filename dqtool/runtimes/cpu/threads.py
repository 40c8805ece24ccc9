"""Threads of a step: OpenMP's on a free machine, the kernels' own pool where other programs use the processors (`threads.cpp`)."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dqtool.runtimes.cpu import library

__all__ = ["float_threads", "step_threads"]

SECONDS = 0.1
"""Seconds of steps after which the machine is judged again."""
LOSSES = 50
"""Times a second that a thread loses its processor to another program on a crowded machine. An endless loop on one of two cores
takes it 70 to 150 times from each of two threads, the system's own work on a free machine 10 to 30 times."""
LARGE = 10**9
"""Multiply-accumulates of a product in float, tens of milliseconds on one thread, from which PyTorch's threads are worth their
busy waiting on a crowded machine."""


@dataclass
class Machine:
    """Judges from the steps of this process whether other programs use the processors."""

    crowded: bool = False
    seconds: float = 0.0
    losses: int = 0

    def add(self, seconds: float, losses: int, threads: int) -> None:
        """Count a step of `threads` threads in which they lost their processors `losses` times."""
        self.seconds += seconds
        self.losses += losses
        if self.seconds >= SECONDS:
            self.crowded = self.losses > LOSSES * threads * self.seconds
            self.seconds, self.losses = 0.0, 0


_machine = Machine()


@contextmanager
def step_threads() -> Iterator[None]:
    """Choose the threads for one step, and learn from it for the next."""
    kernels, threads = library.get(), torch.get_num_threads()
    if kernels is None or threads < 2:
        yield
        return
    had = kernels.dq_begin_step() if _machine.crowded else 0
    start, lost = time.monotonic(), _losses()
    try:
        yield
    finally:
        if had:
            kernels.dq_end_step(had)
        _machine.add(time.monotonic() - start, _losses() - lost, threads)


def _losses() -> int:
    """Return how often the threads of this process have lost a processor that they still had work for."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@contextmanager
def float_threads(work: int) -> Iterator[None]:
    """Give PyTorch all threads of a crowded step for a product in float of `work` multiply-accumulates, if that is much."""
    kernels = library.get() if work >= LARGE else None
    if kernels is not None:
        kernels.dq_float_threads(0)
    try:
        yield
    finally:
        if kernels is not None:
            kernels.dq_float_threads(1)

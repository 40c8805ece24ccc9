"""Threads of a step: OpenMP's on a free machine, the kernels' own pool where other programs use the processors (`threads.cpp`)."""

from __future__ import annotations

import ctypes
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dqtool.runtimes.cpu import library

__all__ = ["float_threads", "step_threads"]

SECONDS = 0.1
"""Seconds of steps after which the machine is judged again."""
LOSSES, OF_THREAD = 60, 20
"""Times a second that the process loses a processor to other programs on a crowded machine: so many, and so many more for each
thread. On two cores an endless loop takes one 130 to 500 times from two threads, the system's own work 20 to 80 times. More
cores were not measured."""
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
            self.crowded = self.losses > (LOSSES + OF_THREAD * threads) * self.seconds
            self.seconds, self.losses = 0.0, 0


_machine = Machine()


@contextmanager
def step_threads(network: nn.Module) -> Iterator[None]:
    """Choose the threads for one step of a network, and learn from it for the next."""
    kernels, threads = library.get(), torch.get_num_threads()
    if kernels is None or threads < 2:
        yield
        return
    taken = ctypes.c_int(0)  # written by the call, so that an interrupt can't come between
    start, lost = time.monotonic(), _losses()
    try:
        if _machine.crowded and not _has_graphs(network):
            kernels.dq_begin_step(ctypes.byref(taken))
        yield
    finally:
        if taken.value:
            kernels.dq_end_step(taken.value)
        _machine.add(time.monotonic() - start, _losses() - lost, threads)


def _has_graphs(network: Any) -> bool:
    """Return whether a network has compiled parts. Another number of threads would compile them once more."""
    forward = network.__dict__.get("forward")
    return hasattr(forward, "_torchdynamo_orig_callable") or any(
        module._compiled_call_impl is not None for module in network.modules()
    )


def _losses() -> int:
    """Return how often the threads of this process have lost a processor that they still had work for."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@contextmanager
def float_threads(work: int) -> Iterator[None]:
    """Give PyTorch all threads of a crowded step for a product in float of `work` multiply-accumulates, if that is much."""
    kernels = library.get() if work >= LARGE else None
    try:
        if kernels is not None:
            kernels.dq_float_threads(0)
        yield
    finally:
        if kernels is not None:
            kernels.dq_float_threads(1)

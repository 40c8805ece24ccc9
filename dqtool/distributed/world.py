"""The processes of this command: how many there are, which one this is, and how they meet and part."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

__all__ = ["is_main", "is_worker", "join", "leave", "local_rank", "rank", "reduction_group", "solo", "world_size"]

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)
"""Variables that torchrun gives each process that it starts."""
PATIENCE = 7 * 24 * 3600
"""Seconds that a process waits for another one. The main process may write an artifact for an hour; a process that ends is
noticed at once."""
GRACE = 5.0
"""Seconds that a process has to stop after a signal before it ends in the middle of an operation."""

_rank, _size, _local = 0, 1, 0
_solo = 0
_reduction: object | None = None


def is_worker() -> bool:
    """Return whether torchrun started this process as one of several. True until `join` and while joined."""
    if _size > 1:
        return True
    return all(name in os.environ for name in VARIABLES) and os.environ["WORLD_SIZE"] != "1"


def rank() -> int:
    """Return the number of this process, from 0; 0 where it works alone."""
    return 0 if _solo else _rank


def world_size() -> int:
    """Return the number of processes that work together."""
    return 1 if _solo else _size


def local_rank() -> int:
    """Return the number of this process among those of its machine, from 0."""
    return _local


def is_main() -> bool:
    """Return whether this is the process that reads standard input, shows progress and writes files."""
    return _rank == 0


def reduction_group() -> object | None:
    """Return the group of processes whose GPUs add up gradients by themselves; None where they go through main memory."""
    return _reduction


@contextlib.contextmanager
def solo() -> Iterator[None]:
    """Let this process work alone in the context: `world_size()` is 1, and it waits for no other."""
    global _solo
    _solo += 1
    try:
        yield
    finally:
        _solo -= 1


def join(device: str = "cpu") -> None:
    """Meet the other processes that torchrun started.

    The variables of torchrun are removed from the environment, so that programs which this process starts work alone.
    `device` is that of the option `--device`: GPUs add up gradients by NCCL where every process has one of its own.
    """
    global _rank, _size, _local
    from datetime import timedelta

    import torch.distributed as dist

    _end_with_parent()
    _end_soon_after_signals()
    with _standard_output_on_standard_error():  # gloo greets there
        dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
        mine = int(os.environ["LOCAL_WORLD_SIZE"])
        _rank, _size, _local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"])
        _join_devices(device, mine)
    for name in VARIABLES:
        os.environ.pop(name, None)


def leave() -> None:
    """Part from the other processes, when all have come here."""
    global _rank, _size, _local, _reduction
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError):
        dist.barrier()
        dist.destroy_process_group()
    _rank, _size, _local, _reduction = 0, 1, 0, None


def _join_devices(device: str, processes_here: int) -> None:
    """Make the group that adds up gradients on GPUs, if every process has one of its own."""
    global _reduction
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    able = device in ("auto", "cuda") and torch.cuda.is_available() and dist.is_nccl_available()
    able = able and torch.cuda.device_count() >= processes_here
    votes: list[bool] = [False] * _size
    dist.all_gather_object(votes, able)
    if all(votes):
        torch.cuda.set_device(_local)
        _reduction = dist.new_group(backend="nccl", timeout=timedelta(seconds=PATIENCE))


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the process that started this one ends, even if it is killed."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _end_soon_after_signals() -> None:
    """End this process `GRACE` seconds after a SIGTERM or SIGINT that it has not obeyed.

    A process that waits for another one, or for a GPU, runs no Python in which the signal could raise its exception.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        os.close(reader)
        os.close(writer)
        return

    def watch() -> None:
        while True:
            for number in os.read(reader, 16):
                if number in (signal.SIGTERM, signal.SIGINT):
                    time.sleep(GRACE)
                    os._exit(128 + number)

    threading.Thread(target=watch, name="dqtool-signals", daemon=True).start()


@contextlib.contextmanager
def _standard_output_on_standard_error() -> Iterator[None]:
    """Send what libraries print to standard output inside to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)

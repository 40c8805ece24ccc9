"""Work of one command by several processes, which torchrun starts on one machine or on many.

Every process runs the same command on the same files and takes the same decisions. Three things differ. Networks run on each
process's part of the samples, and all processes get the whole result (`by_rows`). Gradients of each part are added up
(`add_up`). The main process, rank 0, alone reads standard input, shows progress and writes files.

All functions do nothing, at no cost, in a process that works alone. Nothing here imports torch before several processes
work together.
"""

from __future__ import annotations

from dqtool.distributed.collectives import (
    LostPeer,
    add_up,
    barrier,
    broadcast,
    by_rows,
    copy_main,
    gather,
    gather_rows,
    row_counts,
    shared_batches,
)
from dqtool.distributed.world import is_main, is_worker, join, leave, local_rank, rank, solo, world_size

__all__ = [
    "LostPeer",
    "add_up",
    "barrier",
    "broadcast",
    "by_rows",
    "copy_main",
    "gather",
    "gather_rows",
    "is_main",
    "is_worker",
    "join",
    "leave",
    "local_rank",
    "rank",
    "row_counts",
    "shared_batches",
    "solo",
    "world_size",
]

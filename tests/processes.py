"""Processes for tests of shared work: forked, so that they start at once, and joined as torchrun's are."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["in_processes"]


def in_processes(count: int, work: Callable[[], Any]) -> list[Any]:
    """Run `work` in `count` processes that share their work; return what each returned, by rank. An exception that a
    process raises is returned in its place; a process that ends otherwise has its exit code there."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        children = []
        for rank in range(count):
            child = os.fork()
            if not child:
                _work(rank, count, port, work, Path(folder) / str(rank))
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        return [code or pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank, code in enumerate(codes)]


def _work(rank: int, count: int, port: int, work: Callable[[], Any], file: Path) -> None:
    from dqtool import distributed, report

    try:
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        distributed.join()
        if rank:
            report.mute()
        try:
            result = work()
        except Exception as error:
            traceback.print_exc()
            result = error
        file.write_bytes(pickle.dumps(result))
        if not isinstance(result, Exception):
            distributed.leave()
        os._exit(0)
    finally:
        os._exit(1)

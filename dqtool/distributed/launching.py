"""`--nproc`: the same command by several processes of this machine, started by torchrun's own agent."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dqtool.distributed.failures import LAUNCHED, Failure, recorded
from dqtool.errors import DqtoolError, EnvironmentFault

__all__ = ["Stopped", "WorkerError", "launch"]


class WorkerError(DqtoolError):
    """The error of the process that failed first, with its exit code."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.exit_code = failure.exit_code

    def __str__(self) -> str:
        return self.what


class Stopped(Exception):
    """The command was asked to end by a signal. Its processes have obeyed and said what they keep."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def launch(arguments: Sequence[str], processes: int, debug: bool = False) -> None:
    """Run `dqtool ARGUMENTS` by `processes` processes and wait for them.

    Raises:
        WorkerError: a process failed.
        EnvironmentFault: a process was killed.
        Stopped: a signal ended the command.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.disable(logging.ERROR)  # torchrun tells of each process that it ends
    os.environ[LAUNCHED] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    if Path("/sys/class/net/lo").exists():  # a host's name may lead anywhere
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dqtool", *arguments)
    except ChildFailedError as error:
        raise _cause(error.failures, processes) from error
    except SignalException as error:
        raise Stopped(int(error.sigval)) from error


def _cause(failures: Mapping[int, Any], processes: int) -> DqtoolError:
    """Return the error of a command whose processes failed as torchrun says (`ProcessFailure` by rank)."""
    told = [found for each in failures.values() if (found := recorded(each.error_file)) is not None]
    if told:
        return WorkerError(min(told, key=lambda failure: failure.time))
    killed = {rank: each for rank, each in failures.items() if each.exitcode < 0}
    rank, first = next(iter((killed or failures).items()))
    how = f"was killed by {first.signal_name()}" if killed else f"ended with code {first.exitcode} and no message"
    return EnvironmentFault(
        f"Process {rank} of {processes} (process id {first.pid}) {how}, and the others ended with it",
        fix="If memory ran out, take fewer processes or a smaller --batch-size. The same command goes on from the "
        "finished pieces, with any --nproc",
    )

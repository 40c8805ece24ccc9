"""Commands whose work several processes share: started by `--nproc` here, or by torchrun."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import typer

from dqtool import distributed, report
from dqtool.distributed.failures import LAUNCHED
from dqtool.errors import UsageError
from dqtool.stages.options.declared import RESOURCES, Option
from dqtool.stages.shared.settings import GeneralOptions

__all__ = ["SHARED_COMMANDS", "ProcessOptions", "run_in_processes"]

SHARED_COMMANDS = ("quantize", "run", "calibrate", "distill", "eval", "sample")
"""Commands that several processes share. The main process runs all other commands alone."""


@dataclass(frozen=True)
class ProcessOptions:
    """Options of the commands that several processes share."""

    nproc: Annotated[
        int,
        Option(
            "Processes of this machine that share the work, by torchrun; each takes a GPU of its own if there are enough. "
            "Several machines: `torchrun --nnodes N ... -m dqtool COMMAND`.",
            "N",
            least=1,
            panel=RESOURCES,
        ),
    ] = 1


def run_in_processes(body: Callable[[], None], command: str, settings: GeneralOptions, processes: int) -> None:
    """Run a command's body: in this process, in processes that `--nproc` starts, or as one of torchrun's processes.

    Raises:
        UsageError: `--nproc` is given to a process that torchrun started.
    """
    if not distributed.is_worker():
        if processes == 1 or settings.dry_run:
            body()
            return
        from dqtool.distributed.launching import Stopped, launch

        try:
            launch(sys.argv[1:], processes, settings.debug)
        except Stopped as stop:
            report.say(f"dqtool {command}: ended by {stop}")
            raise typer.Exit(stop.exit_code) from stop
        return
    if processes > 1 and LAUNCHED not in os.environ:
        raise UsageError(
            "torchrun started this process, and says how many there are",
            where="--nproc",
            fix="Leave it out, or start dqtool without torchrun",
        )
    distributed.join(settings.device)
    if not distributed.is_main():
        report.mute()
        _discard_output()
    if distributed.is_main() or command in SHARED_COMMANDS:
        if command in SHARED_COMMANDS:
            body()
        else:
            with distributed.solo():
                body()
    distributed.leave()


def _discard_output() -> None:
    """Send standard output to nowhere, that of libraries too."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)

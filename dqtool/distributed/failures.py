"""Errors of processes that torchrun started, in the files where it looks for them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass

__all__ = ["FILE", "LAUNCHED", "Failure", "record_failure", "recorded"]

LAUNCHED = "DQTOOL_LAUNCHED"
"""Variable that is set in processes whose errors the starting process reports."""
FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable with the path of the file in which torchrun expects this process's error."""


@dataclass(frozen=True)
class Failure:
    """Error of a process: its paragraph, its exit code, and the time in seconds since 1970."""

    text: str
    exit_code: int
    time: float


def record_failure(text: str, exit_code: int) -> None:
    """Leave the error of this process to torchrun, in the format of `torch.distributed.elastic`'s `ErrorHandler`."""
    path = os.environ.get(FILE)
    if path is None:
        return
    now = time.time()
    extra = {"py_callstack": text, "timestamp": str(int(now)), "exit_code": exit_code, "time": now}
    try:
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)
    except OSError:  # it is told on standard error, too
        return


def recorded(path: str) -> Failure | None:
    """Return the failure that `record_failure` left in a file; None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            message = json.load(file)["message"]
        extra = message["extraInfo"]
        return Failure(str(message["message"]), int(extra["exit_code"]), float(extra["time"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None

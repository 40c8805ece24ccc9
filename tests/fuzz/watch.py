"""An audit hook that sees every write, process and connection of the interpreter, wherever it goes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Watch"]

_PATHS = {
    **{"os.mkdir": (0,), "os.rename": (0, 1), "os.symlink": (1,), "os.link": (1,), "os.remove": (0,), "os.rmdir": (0,)},
    **{"os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "shutil.rmtree": (0,), "shutil.move": (0, 1)},
    **{"shutil.copyfile": (1,), "shutil.copytree": (1,), "os.utime": (0,)},
}
"""Audit events that change files, and which of their arguments are the paths that change."""
_NEVER = frozenset(
    {
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "os.posix_spawn",
        "os.fork",
        "os.forkpty",
        "socket.connect",
        "os.startfile",
    }
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Collects in `faults` what is written outside `folder`, and while `strict` is on, inside it too.

    Python raises these events before it calls the system; libraries that write by themselves are not seen.
    """

    def __init__(self, folder: Path) -> None:
        self.root = os.path.realpath(folder)
        self.active, self.strict = False, False
        self.faults: list[str] = []
        sys.addaudithook(self._see)

    @contextmanager
    def watching(self, strict: bool) -> Iterator[None]:
        """Watch the block; `strict` takes any write for a fault."""
        self.active, self.strict = True, strict
        try:
            yield
        finally:
            self.active = False

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or not (flags or 0) & _WRITES:
                return
            self._check(f"open for writing ({mode}, {flags:#x})", path)
        elif event in _PATHS:
            for place in _PATHS[event]:
                self._check(event, arguments[place])
        elif event in _NEVER:
            self.faults.append(f"{event} {str(arguments)[:200]}")

    def _check(self, what: str, path: Any) -> None:
        if isinstance(path, int):
            return
        name = os.fsdecode(path)
        real = os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))
        if real == os.devnull or (not self.strict and (real == self.root or real.startswith(self.root + os.sep))):
            return
        self.faults.append(f"{what} {name!a:.200}")

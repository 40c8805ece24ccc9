"""`dqtool` and `python -m dqtool`: run the command line and turn every failure into one paragraph and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

from dqtool import distributed, stopping

if TYPE_CHECKING:
    from dqtool.errors import EnvironmentFault

__all__ = ["main"]

INTERRUPTED = 130
TERMINATED = 143

_SILENCE = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Read by the libraries when they are imported; progress is ours to show."""


_SPIN = "3000"
"""Turns of a thread that waits for others before it sleeps (`GOMP_SPINCOUNT`), some tens of microseconds. OpenMP's own
default of 300,000 takes the processor from the very thread that is waited for, where other programs use the machine."""


def main() -> int:
    """Run `sys.argv`; returns the exit code. Nothing escapes but a traceback that --debug asked for."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        stopping.watch()
        _share_processors()
        if not debug:
            _silence_libraries()
        from dqtool.cli import invoke

        if hasattr(sys.stdout, "reconfigure"):  # a path of any bytes is printed as it was given
            sys.stdout.reconfigure(errors="surrogateescape")
        code = invoke(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader took what it wanted (`| head -1`). What is still buffered must not fail again at exit.
        _discard_standard_output()
        return 0
    except KeyboardInterrupt as stop:
        return _stopped(arguments, type(stop))
    except Exception as error:
        asked = stopping.pending_stop()  # a library may raise an error of its own where a signal interrupts it
        return _fail(arguments, error, debug) if asked is None else _stopped(arguments, asked)


def _stopped(arguments: list[str], stop: type[KeyboardInterrupt]) -> int:
    terminated = issubclass(stop, stopping.Terminated)
    code = TERMINATED if terminated else INTERRUPTED
    kept = _what_is_kept()
    if not distributed.is_worker():
        _print_fault(arguments, f"{'terminated' if terminated else 'interrupted'}; {kept}")
        return code
    if distributed.is_main() and kept[0].isdigit():  # the cause is another process, which reports it
        _print_fault(arguments, kept)
    os._exit(code)


def _share_processors() -> None:
    """Let waiting threads sleep soon. PyTorch's OpenMP reads this when it is loaded; the user's own settings come first."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN)


def _what_is_kept() -> str:
    """Return what a stopped command leaves for the next run, without importing what it did not import itself."""
    workspaces = sys.modules.get("dqtool.artifacts.workspace")
    pieces, where = workspaces.kept() if workspaces is not None else (0, "")
    if not pieces:
        return "no unfinished work had to be kept; run the same command to start again"
    return f"{pieces} finished pieces are kept in {where}; the same command goes on from there"


def _fail(arguments: list[str], error: Exception, debug: bool) -> int:
    from dqtool.errors import DqtoolError

    if debug:
        import traceback

        traceback.print_exception(error)
    fault = error if isinstance(error, DqtoolError) else _fault(error)
    if fault is not None:
        return _report(arguments, error, str(fault), fault.exit_code)
    from dqtool.errors import plain

    hint = "" if debug else " Run it again with --debug for the traceback."
    text = f"unexpected {type(error).__name__}: {plain(str(error))[:380]}. This is a bug in dqtool.{hint}"
    return _report(arguments, error, text, 1)


def _report(arguments: list[str], error: Exception, text: str, code: int) -> int:
    """Print the text of an error, or leave it to the process that started this one; return the exit code."""
    if not distributed.is_worker():
        _print_fault(arguments, text)
        return code
    from dqtool.distributed.failures import LAUNCHED, record_failure

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # this process is ending already
    if isinstance(error, distributed.LostPeer):
        time.sleep(0.3)  # the process that caused it ends first
    else:
        record_failure(text, code)
    if LAUNCHED not in os.environ:
        _print_fault(arguments, f"[process {os.environ.get('RANK', distributed.rank())}] {text}")
    sys.stderr.flush()
    os._exit(code)  # others may wait for this process, and its libraries for them


def _fault(error: Exception) -> EnvironmentFault | None:
    """Return the error of dqtool for a fault of the environment; None for any other exception."""
    from dqtool.artifacts.files import os_fault
    from dqtool.errors import EnvironmentFault

    if isinstance(error, OSError):
        return os_fault(error, error.filename or "standard output or an open file")
    if "Too many open files" in str(error):  # other libraries raise errors of their own with this text
        return os_fault(OSError(errno.EMFILE, "Too many open files"), "an open file")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return EnvironmentFault("A path holds a NUL character", where="a path", fix="Check the names that are given")
    from dqtool.core.out_of_memory import is_out_of_memory

    if is_out_of_memory(error):
        return EnvironmentFault(
            "There is not enough memory", fix="Lower --batch-size or --samples, or use a larger machine"
        )
    return None


def _print_fault(arguments: list[str], text: str) -> None:
    words = [word for word in arguments[:2] if not word.startswith("-")]
    known = words[: 2 if words[:1] == ["zoo"] else 1]
    command = " ".join(["dqtool", *(word for word in known if word.isidentifier() and len(word) < 20)])
    try:
        print(f"{command}: {text}", file=sys.stderr, flush=True)
    except (OSError, ValueError):  # the reader of our messages is gone
        return


def _silence_libraries() -> None:
    for name, value in _SILENCE.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        import warnings

        from dqtool import report
        from dqtool.errors import DqtoolWarning

        warnings.simplefilter("ignore")
        warnings.simplefilter("default", DqtoolWarning)
        warnings.showwarning = lambda message, *_, **__: report.warn(str(message))


def _discard_standard_output() -> None:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


if __name__ == "__main__":
    sys.exit(main())

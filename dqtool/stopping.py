"""Requests to stop: Ctrl-C and SIGTERM.

Each raises an exception in the main thread, and is remembered. Libraries written in C may turn the exception into one of
their own, or swallow it. `raise_pending_stop` raises it again at the next unit of work.
"""

from __future__ import annotations

import signal

__all__ = ["Terminated", "pending_stop", "raise_pending_stop", "watch"]

_asked: type[KeyboardInterrupt] | None = None


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers and containers do (exit code 143). Handled like an interrupt."""


def watch() -> None:
    """Handle both signals from now on, unless this process ignores them or another program handles them.

    After a SIGTERM further ones are ignored: a second one must not break the sweep. Does nothing outside the main thread.
    """
    global _asked
    _asked = None
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _interrupt)
    except ValueError:
        return


def pending_stop() -> type[KeyboardInterrupt] | None:
    """Return the exception of a signal that arrived since `watch`; None if there was none."""
    return _asked


def raise_pending_stop() -> None:
    """Raise the exception of a signal that arrived, if something swallowed it.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        Terminated: after SIGTERM.
    """
    if _asked is not None:
        raise _asked


def _terminate(_signal: int, _frame: object) -> None:
    global _asked
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _asked = Terminated
    raise Terminated


def _interrupt(_signal: int, _frame: object) -> None:
    global _asked
    _asked = _asked or KeyboardInterrupt
    raise KeyboardInterrupt

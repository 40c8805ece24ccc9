"""Messages, warnings, tables and progress of a running stage, on standard error. Standard output belongs to the result."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dqtool.errors import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Progress", "format_seconds", "mute", "progress", "say", "set_quiet", "table", "table_lines", "warn"]

FIRST_LINE = 1.0  # seconds until a plain progress line appears
LINE_EVERY = 5.0  # seconds between plain progress lines

_quiet = False
_mute = False
_live: RichProgress | None = None  # the one live display of the terminal; nested bars are rows of it


def set_quiet(quiet: bool) -> None:
    """Silence progress, `say` and `table`; warnings are still shown."""
    global _quiet
    _quiet = quiet or _mute


def mute() -> None:
    """Silence everything, warnings too, for the rest of this process: another process shows the same."""
    global _quiet, _mute
    _quiet = _mute = True


def say(text: str) -> None:
    """Show one message."""
    if not _quiet:
        _emit(text)


def warn(text: str) -> None:
    """Show one warning, even when quiet: a warning says that a result may not be what the user wants."""
    if not _mute:
        _emit(f"warning: {text}", style="yellow")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show a table. No cell is ever truncated: if the terminal is too narrow, or there is none, the table is aligned
    plain text.

    Floats have six significant digits (pass text for another precision), and None is `-`. Columns that hold only
    numbers are aligned right.
    """
    if _quiet:
        return
    cells, right, widths = _layout(columns, rows)
    if _on_terminal():
        console = _console()
        if sum(widths) + 3 * len(widths) + 1 <= console.width:
            _emit_rich_table(console, title, columns, right, cells)
            return
    _emit(title)
    for line in table_lines(columns, rows):
        _emit(line)


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return the lines of a table as aligned plain text, for reports that are the result itself."""
    cells, right, widths = _layout(columns, rows)
    return [
        "  ".join(
            text.rjust(width) if is_right else text.ljust(width)
            for text, width, is_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [list(columns), ["-" * width for width in widths], *cells]
    ]


def progress(what: str, total: int | None, unit: str = "step") -> Progress:
    """Return a context manager that shows progress: `with progress("calibrate", 100) as p: p.advance()`.

    `what` is the label, `total` the number of units (None if unknown). A terminal shows a bar with the time left.
    Otherwise a plain line appears after a second and about every five seconds from then on, even if nothing advances,
    and one at the end.
    """
    return Progress(what, total, unit)


class Progress:
    """Running count with an estimate of the time left, made by `progress`. Nested ones share the terminal."""

    def __init__(self, what: str, total: int | None, unit: str = "step") -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._skipped = 0
        self._note = ""
        self._display: _Bar | _Lines | None = None
        self._start = time.monotonic()

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        if not _quiet:
            self._display = _Bar(self) if _on_terminal() else _Lines(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._display is not None:
            self._display.close(stopped=kind is not None)
            self._display = None

    def advance(self, n: int = 1, note: str | None = None) -> None:
        """Count `n` more finished units; `note` (a loss, a layer's name) is shown until the next one."""
        self.done += n
        if note is not None:
            self._note = note
        if self._display is not None:
            self._display.update()

    def skip(self, n: int = 1, note: str | None = None) -> None:
        """Count `n` units that an earlier run finished; they do not affect the estimated time."""
        self._skipped += n
        self.advance(n, note)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    @property
    def eta(self) -> float | None:
        """Seconds left at the mean speed so far; None while the speed is unknown."""
        worked = self.done - self._skipped
        if self.total is None or worked <= 0:
            return None
        return self.elapsed / worked * max(0, self.total - self.done)

    def line(self, *, last: bool = False, stopped: bool = False) -> str:
        """Return the plain line: `calibrate 12/100 step  elapsed 3s  eta 22s  note`."""
        count = str(self.done) if self.total is None else f"{self.done}/{self.total}"
        parts = [f"{self.what} {count} {self.unit}", f"elapsed {format_seconds(self.elapsed)}"]
        if stopped:
            parts.append("stopped")
        elif not last and self.total is not None:
            parts.append(f"eta {'?' if self.eta is None else format_seconds(self.eta)}")
        return "  ".join([*parts, self._note] if self._note else parts)


def format_seconds(seconds: float) -> str:
    """Return a duration as `7s`, `2m05s` or `1h02m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class _Lines:
    """Plain progress lines from a separate thread, so that a step that takes a minute does not look like a hang."""

    def __init__(self, owner: Progress) -> None:
        self._owner = owner
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dqtool-progress", daemon=True)
        self._thread.start()

    def update(self) -> None:
        """Do nothing: the thread reads the count when a line is due."""

    def close(self, *, stopped: bool) -> None:
        self._closed.set()
        self._thread.join()
        _emit(self._owner.line(last=True, stopped=stopped))

    def _run(self) -> None:
        wait = FIRST_LINE
        while not self._closed.wait(wait):
            _emit(self._owner.line())
            wait = LINE_EVERY


class _Bar:
    """Row of the terminal's live display, which the outermost row starts and stops."""

    def __init__(self, owner: Progress) -> None:
        global _live
        self._owner = owner
        self._outermost = _live is None
        if _live is None:
            _live = _rich_progress()
            _live.start()
        self._rich = _live
        self._task: TaskID = self._rich.add_task(owner.what, total=owner.total, line=self._line)

    def update(self) -> None:
        self._rich.update(self._task, completed=self._owner.done)

    def close(self, *, stopped: bool) -> None:
        global _live
        final = self._line(last=True, stopped=stopped)
        self._rich.update(self._task, completed=self._owner.done, line=lambda: final)
        if self._outermost:
            self._rich.stop()
            _live = None
        else:
            self._rich.remove_task(self._task)

    def _line(self, *, last: bool = False, stopped: bool = False) -> str:
        return self._owner.line(last=last, stopped=stopped).removeprefix(self._owner.what).strip()


def _rich_progress() -> RichProgress:
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
    from rich.progress import Progress as Display
    from rich.text import Text

    class Line(ProgressColumn):
        """Count and times, evaluated at every refresh, so that they change between two steps as well."""

        def render(self, task: Task) -> Text:
            return Text(task.fields["line"]())

    return Display(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), Line(), console=_console()
    )


def _layout(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> tuple[list[list[str]], list[bool], list[int]]:
    """Return the cells as text, whether each column is aligned right, and the width of each column."""
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[index]) for row in rows) for index in range(len(columns))]
    widths = [max(len(line[index]) for line in [list(columns), *cells]) for index in range(len(columns))]
    return cells, right, widths


def _emit_rich_table(
    console: Console, title: str, columns: Sequence[str], right: Sequence[bool], cells: Sequence[Sequence[str]]
) -> None:
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title), title_justify="left")
    for column, is_right in zip(columns, right, strict=True):
        grid.add_column(Text(column), justify="right" if is_right else "left", no_wrap=True)
    for line in cells:
        grid.add_row(*(Text(text) for text in line))
    console.print(grid)


def _emit(text: str, style: str | None = None) -> None:
    if sys.stderr is None:
        return
    if not text.isprintable():  # names come from files
        text = "\n".join(shown(line) for line in text.split("\n"))
    try:
        if _on_terminal():
            _console().print(text, style=style, markup=False, highlight=False, soft_wrap=True)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()
    except (OSError, ValueError):
        # The reader of the messages has gone (`2>&1 | head`) or closed them, which must not end hours of work.
        return


def _on_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # closed
        return False


def _console() -> Console:
    if _live is not None:
        return _live.console
    from rich.console import Console

    return Console(stderr=True)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return True
    try:
        float(str(value).replace(",", "").rstrip("x%"))
    except ValueError:
        return False
    return True

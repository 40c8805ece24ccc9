"""Every failure a user can meet, with the exit code it maps to.

The command line turns a `DqtoolError` into one short paragraph on standard error and the class's `exit_code`. Anything
else that escapes is a bug in dqtool.
"""

from __future__ import annotations

__all__ = [
    "ArtifactError",
    "DqtoolError",
    "DqtoolWarning",
    "EnvironmentFault",
    "NumericError",
    "UsageError",
    "plain",
    "shown",
]

LONGEST = 500
"""Most characters of a message."""


class DqtoolError(Exception):
    """A failure, reported in one paragraph: what happened, where (file, key, layer) and what to do about it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [plain(self.what)]
        if self.where:
            parts.append(plain(f"Where: {self.where}"))
        if self.fix:
            parts.append(plain(self.fix))
        while (excess := sum(map(len, parts)) + 2 * len(parts) - LONGEST) > 0:
            longest = max(range(len(parts)), key=lambda number: len(parts[number]))
            parts[longest] = _shortened(parts[longest], max(len(parts[longest]) - excess, 60))
        return " ".join(map(_sentence, parts))


class UsageError(DqtoolError):
    """The command line or the recipe asks for something that dqtool does not offer (exit code 2)."""

    exit_code = 2


class ArtifactError(DqtoolError):
    """A file exists and is not the expected one: it is damaged, foreign, or of another stage (exit code 3)."""

    exit_code = 3


class EnvironmentFault(DqtoolError):
    """The environment prevents the command: missing file, full or read-only disk, missing extra, lock held (exit code 4)."""

    exit_code = 4


class NumericError(DqtoolError):
    """A number is NaN or infinite, or a computation diverged (exit code 5)."""

    exit_code = 5


class DqtoolWarning(UserWarning):
    """Warning of dqtool. The command line shows these, and hides the warnings of other libraries."""


def plain(text: str) -> str:
    """Return a text as one line without control characters. Spaces inside a path stay.

    Names and values from files may hold such characters: escape sequences would act on the terminal, and marks of direction
    disguise a name.
    """
    if len(text) > 20 * LONGEST:
        text = _shortened(text, 20 * LONGEST)
    return shown(" ".join(part.strip() for part in text.splitlines() if part.strip()))


def shown(line: str) -> str:
    """Return a line with its control characters written as escapes."""
    if line.isprintable():
        return line
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def _shortened(text: str, length: int) -> str:
    """Return the beginning and the end of a text."""
    head = (length - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (length - 5 - head) :]}"


def _sentence(line: str) -> str:
    return line if line.endswith((".", "?", "!")) else line + "."

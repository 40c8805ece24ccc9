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
    "Terminated",
    "UsageError",
]


class DqtoolError(Exception):
    """A failure said in one paragraph: what happened, where (file, key, layer) and what to do about it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [_sentence(self.what)]
        if self.where:
            parts.append(_sentence(f"Where: {self.where}"))
        if self.fix:
            parts.append(_sentence(self.fix))
        return " ".join(parts)


class UsageError(DqtoolError):
    """The command line or the recipe asks for something that is not offered (exit code 2)."""

    exit_code = 2


class ArtifactError(DqtoolError):
    """A file exists and is not what it should be: damaged, foreign, or of another stage (exit code 3)."""

    exit_code = 3


class EnvironmentFault(DqtoolError):
    """The surroundings are in the way: missing file, full or read-only disk, missing extra, lock held (exit code 4)."""

    exit_code = 4


class NumericError(DqtoolError):
    """A number is NaN or infinite, or a computation diverged (exit code 5)."""

    exit_code = 5


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM, as schedulers and containers do (exit code 143). Handled like an interrupt."""


class DqtoolWarning(UserWarning):
    """What a library user is warned of; the command line shows these and hides the warnings of other libraries."""


def _sentence(text: str) -> str:
    # Texts quoted from other libraries may span lines, and the promise is one paragraph; spaces inside a path stay.
    line = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return line if line.endswith((".", "?", "!")) else line + "."

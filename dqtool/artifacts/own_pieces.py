"""Pieces of an unfinished stage that each process saves by itself, while the processes of a command work on different things."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from dqtool.artifacts.files import fsync_path, os_fault, sha256_file
from dqtool.artifacts.tensorfile import load_tensors, save_tensors
from dqtool.errors import DqtoolError
from dqtool.stopping import raise_pending_stop

if TYPE_CHECKING:
    import torch

__all__ = ["SUFFIX", "OwnPieces"]

SUFFIX = ".own"
"""Ending of the names of whole pieces."""


class OwnPieces:
    """Pieces in `directory`, each a file `KEY.NUMBER.SHA256.own`. No index is shared, and one move makes a piece valid.

    A key is saved by one process at a time, and any process can load it. The highest number counts; the file of an earlier one
    goes after the move. `saved` is called after each save. Methods raise `EnvironmentFault` when the disk is in the way.
    """

    def __init__(self, directory: Path, saved: Callable[[], None] = lambda: None) -> None:
        self.directory, self._saved = directory, saved

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors saved under `key`; None if there are none or their files are damaged."""
        for _, file in reversed(self._files(key)):
            try:
                if sha256_file(file) == file.name.split(".")[-2]:
                    return load_tensors(file)
            except DqtoolError:
                continue
        return None

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep `tensors` under `key`. An interrupt leaves the key as it was."""
        raise_pending_stop()
        earlier = self._files(key)
        number = earlier[-1][0] + 1 if earlier else 0
        new = self.directory / f"{_name(key)}.new"
        try:
            save_tensors(new, tensors)
            fsync_path(new)
            os.replace(new, self.directory / f"{_name(key)}.{number}.{sha256_file(new)}{SUFFIX}")
            fsync_path(self.directory)
            for _, file in earlier:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise os_fault(error, self.directory) from error
        self._saved()

    def alone(self) -> OwnPieces:
        """Return itself."""
        return self

    def _files(self, key: str) -> list[tuple[int, Path]]:
        """Return the numbers and files of a key in ascending order."""
        found = []
        for file in self.directory.glob(f"*{SUFFIX}"):
            name, _, rest = file.name.removesuffix(SUFFIX).partition(".")
            number, _, digest = rest.partition(".")
            if name == _name(key) and number.isascii() and number.isdigit() and len(number) < 10 and len(digest) == 64:
                found.append((int(number), file))
        return sorted(found)


def _name(key: str) -> str:
    """Return a key as the first part of a file name, without a dot."""
    return quote(key, safe="").replace(".", "%2E")

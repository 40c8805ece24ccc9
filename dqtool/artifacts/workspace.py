"""Intermediate results of a long stage, from which an interrupted run goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from dqtool import distributed
from dqtool.artifacts.files import fsync_path, os_fault, partial_of, sha256_file, staging, target_of
from dqtool.artifacts.own_pieces import SUFFIX, OwnPieces
from dqtool.artifacts.reading import MANIFEST_BYTES, load_json
from dqtool.artifacts.tensorfile import load_tensors, save_tensors
from dqtool.errors import DqtoolError
from dqtool.stopping import raise_pending_stop

if TYPE_CHECKING:
    import torch

__all__ = ["Workspace", "kept"]

_last: Workspace | None = None


def kept() -> tuple[int, str]:
    """Return how many pieces the workspace opened last holds, and its directory; 0 where none is open."""
    return (0, "") if _last is None else (_last.count, str(_last.directory))


class Workspace:
    """Finished pieces of the output `path`, in `.NAME.partial/` beside it, each saved atomically under a key.

    Opening discards pieces of another fingerprint. With `forced`, which stands for a run that ignores the cache, it also
    discards pieces of runs that were not forced, so that a forced run goes on from its own pieces alone. The first `save`
    makes the directory, `clear` removes it after the commit. Files are written beside the directory and moved in whole.
    Only the holder of the lock on `path` may use a workspace. Where several processes share a command, the main one saves, and
    all of them ask for keys and load pieces together. Methods raise `EnvironmentFault` when the disk is in the way.

    The index also records seconds and peaks, so that work done in several runs knows its whole cost (`spent`, `peaks`).
    """

    def __init__(self, path: str | os.PathLike[str], fingerprint: str, *, forced: bool = False) -> None:
        global _last
        _last = self
        self._target = target_of(path)
        self.forced = forced
        self.directory = partial_of(self._target)
        self.fingerprint = fingerprint
        self._index = self.directory / "index.json"
        self._pieces: dict[str, dict[str, Any]] = {}
        self._earlier, self._earlier_peaks = (0.0, 0.0), dict[str, int]()
        self._opened, self._earlier_seconds = time.perf_counter(), 0.0
        self._began: tuple[float, float] | None = None
        self.restart_clock()
        if distributed.is_main() and os.path.lexists(self.directory):
            pieces = self._read_index()
            if pieces is None:
                self.clear()
            else:
                self._pieces = pieces

    @property
    def count(self) -> int:
        """Number of saved keys."""
        return len(self._pieces) + sum(1 for _ in self.directory.glob(f"*{SUFFIX}"))

    def keys(self) -> list[str]:
        """Return the saved keys in the order in which they were first saved."""
        return distributed.broadcast(list(self._pieces))

    def load(self, key: str) -> dict[str, torch.Tensor] | None:
        """Return the tensors saved under `key`; None if there are none or their file is damaged."""
        file = self._file(key)
        if not distributed.broadcast(distributed.is_main() and self._is_whole(key)):
            return None
        try:
            return load_tensors(file)
        except DqtoolError:
            if distributed.world_size() > 1:
                raise
            return None
        finally:
            distributed.barrier()  # before anything else is saved under the key

    def _is_whole(self, key: str) -> bool:
        piece = self._pieces.get(key)
        try:
            return piece is not None and sha256_file(self._file(key)) == piece["sha256"]
        except DqtoolError:
            return False

    def save(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep `tensors` under `key`. An interrupt leaves the key as it was, or makes `load` answer None."""
        raise_pending_stop()
        if not distributed.is_main():
            return
        try:
            self.directory.mkdir(exist_ok=True)
            with staging(self._target) as area:
                new, note = area / "piece.safetensors", area / "index.json"
                save_tensors(new, tensors)
                fsync_path(new)
                digest = sha256_file(new)
                os.replace(new, self._file(key))
                self._pieces[key] = {"sha256": digest}
                self._write_index(note)
        except OSError as error:
            raise os_fault(error, self.directory) from error

    def alone(self) -> OwnPieces:
        """Return storage of pieces that each process saves and loads by itself, for work that no other shares.

        All processes call this together, and have the same pieces of earlier runs then. Their keys are apart from those of
        `keys`.
        """
        if distributed.is_main():
            self._note()
        distributed.barrier()
        return OwnPieces(self.directory, self._note if distributed.is_main() else lambda: None)

    def _note(self) -> None:
        """Write the index alone, so that a later run knows whose pieces there are and what they cost."""
        try:
            self.directory.mkdir(exist_ok=True)
            with staging(self._target) as area:
                self._write_index(area / "index.json")
        except OSError as error:
            raise os_fault(error, self.directory) from error

    def _write_index(self, note: Path) -> None:
        """Write the index to the new file `note`, and move it into place."""
        index = {
            "fingerprint": self.fingerprint,
            "forced": self.forced,
            "pieces": self._pieces,
            "seconds": self._earlier_seconds + time.perf_counter() - self._opened,
            "spent": self.spent(),
            "peaks": self.peaks(),
        }
        note.write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        fsync_path(note)
        os.replace(note, self._index)
        fsync_path(self.directory)

    def stop_clock(self) -> None:
        """Count nothing as spent until `restart_clock`."""
        self._began = None

    def restart_clock(self, figures: Callable[[], Mapping[str, int]] = dict) -> None:
        """Count this run's seconds from here (without it, since the workspace was opened). `figures` tells the peaks so far
        of what else is to be known of all runs."""
        self._began = (time.perf_counter(), time.process_time())
        self._figures = figures

    def spent(self) -> tuple[float, float]:
        """Return the wall-clock and processor seconds of this run and of earlier runs up to their last `save`."""
        if self._began is None:
            return self._earlier
        now = (time.perf_counter(), time.process_time())
        first, second = (e + n - b for e, n, b in zip(self._earlier, now, self._began, strict=True))
        return first, second

    def peaks(self) -> dict[str, int]:
        """Return the largest of each of `figures`, of this run and of earlier ones up to their last `save`."""
        found = dict(self._earlier_peaks)
        for name, value in self._figures().items():
            found[name] = max(value, found.get(name, 0))
        return found

    def earlier_seconds(self) -> float:
        """Seconds that earlier runs took up to their last `save`."""
        return self._earlier_seconds

    def clear(self) -> None:
        """Remove the workspace."""
        self._pieces = {}
        self._earlier, self._earlier_peaks, self._earlier_seconds = (0.0, 0.0), {}, 0.0
        try:
            shutil.rmtree(self.directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise os_fault(error, self.directory) from error

    def _file(self, key: str) -> Path:
        return self.directory / f"{quote(key, safe='')}.tensors"

    def _read_index(self) -> dict[str, dict[str, Any]] | None:
        try:
            index = load_json(self._index, MANIFEST_BYTES)
            if index["fingerprint"] != self.fingerprint or (self.forced and not index["forced"]):
                return None
            seconds, processor = index.get("spent", (0.0, 0.0))
            self._earlier = (float(seconds), float(processor))
            self._earlier_seconds = float(index.get("seconds", seconds))
            self._earlier_peaks = {str(name): int(value) for name, value in index.get("peaks", {}).items()}
            return {str(key): {"sha256": piece["sha256"]} for key, piece in index["pieces"].items()}
        except (DqtoolError, OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

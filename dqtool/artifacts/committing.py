"""Writing artifacts: all of it or nothing, the manifest last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool.artifacts.files import fsync_path, os_fault, sha256_file, staging, swap_in, target_of, write_text
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.manifest import Manifest
from dqtool.artifacts.outputs import check_writable
from dqtool.artifacts.records import FileRecord
from dqtool.artifacts.schema import unchecked
from dqtool.artifacts.store import DIRECTORY_MANIFEST, Artifact, manifest_path
from dqtool.artifacts.tensorfile import library_faults, load_tensors, save_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["Written", "commit", "commit_directory", "commit_report"]

Written = Callable[[], "dict[str, torch.Tensor]"]
"""Waits for a file that is being written; then its tensors, mapped."""


def commit(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    manifest: Manifest,
    proof: Callable[[Written], JsonObject] | None = None,
    *,
    overwrite: bool = False,
) -> Artifact:
    """Write a safetensors artifact and its manifest; `manifest.file` is filled in. `overwrite` as in `check_writable`.

    `proof` runs in a thread while the data is being written. It is given a function that waits for the end of that and
    maps the new file's tensors; its result is added to the metrics. What it raises is raised, and nothing is committed.

    Equal tensors give byte-identical files. After a failure or interrupt what stood at `path` before still stands,
    whole (or, in the instant after the last move, the new artifact), and no temporary file is left. Raises `EnvironmentFault` for a full, read-only or missing place, `NumericError` for a
    NaN in the manifest.
    """
    check_writable(path, overwrite=overwrite)
    target = target_of(path)
    try:
        with staging(target) as area:
            data, note = area / "data.safetensors", area / "manifest.json"
            note.touch()
            with _meanwhile(proof) as (written, found):
                digest = save_tensors(data, tensors)
                written.set_result(data)
                data.chmod(note.stat().st_mode)  # safetensors makes its files private
                fsync_path(data)
                add_metrics(manifest, found.result())
            manifest.file = FileRecord(data.stat().st_size, digest or sha256_file(data), target.name)
            manifest.files = None
            _write(note, manifest.to_json())
            swap_in(area, [(data, target), (note, manifest_path(target))])
    except OSError as error:
        raise os_fault(error, path) from error
    return Artifact(target, os.fspath(path), manifest)


def commit_directory(
    path: str | os.PathLike[str],
    build: Callable[[Path], object],
    manifest: Manifest,
    *,
    overwrite: bool = False,
) -> Artifact:
    """Let `build` fill a new directory, then put it at `path` with its manifest; `manifest.files` is filled in.

    `build` may return further metrics.

    A directory that dqtool made before is replaced as a whole. Raises `EnvironmentFault`, with nothing touched, when
    the directory at `path` holds anything else; else as `commit`.
    """
    check_writable(path, "directory", overwrite=overwrite)
    target = target_of(path)
    try:
        with staging(target) as area:
            new = area / "new"
            new.mkdir()
            with library_faults(path):
                found = build(new)
            if isinstance(found, Mapping):
                add_metrics(manifest, found)
            note = new / DIRECTORY_MANIFEST
            note.touch()
            manifest.file, manifest.files = None, {}
            for entry in sorted(new.rglob("*")):
                if entry.is_file() and entry != note:
                    entry.chmod(note.stat().st_mode)
                    fsync_path(entry)
                    name = entry.relative_to(new).as_posix()
                    manifest.files[name] = FileRecord(entry.stat().st_size, sha256_file(entry))
            _write(note, manifest.to_json())
            fsync_path(new)
            swap_in(area, [(new, target)])
    except OSError as error:
        raise os_fault(error, path) from error
    return Artifact(target, os.fspath(path), manifest)


def commit_report(path: str | os.PathLike[str], report: Manifest | JsonObject, *, overwrite: bool = False) -> None:
    """Write a report, one JSON file, atomically. A manifest (stage eval) makes it an artifact that can be cached."""
    check_writable(path, "report", overwrite=overwrite)
    if isinstance(report, Manifest):
        report.file = report.files = None
        text = report.to_json()
    else:
        text = json.dumps(report, sort_keys=True, indent=1, allow_nan=False) + "\n"
    write_text(target_of(path), text)


def add_metrics(manifest: Manifest, found: JsonObject) -> None:
    """Add metrics that are known once the data is written."""
    manifest.metrics = unchecked({**manifest.metrics.to_json(), **found}, type(manifest.metrics))


@contextlib.contextmanager
def _meanwhile(
    proof: Callable[[Written], JsonObject] | None,
) -> Iterator[tuple[Future[Path], Future[JsonObject]]]:
    """Run the proof in a thread: the future of the written file, to be set within the block, and that of its result."""
    written: Future[Path] = Future()
    found: Future[JsonObject] = Future()
    if proof is None:
        found.set_result({})
        yield written, found
        return
    with ThreadPoolExecutor(1) as pool:
        try:
            yield written, pool.submit(proof, lambda: load_tensors(written.result()))
        except BaseException:
            written.cancel()  # for a proof that waits for it
            raise


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    fsync_path(path)

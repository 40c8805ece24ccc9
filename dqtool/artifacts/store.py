"""Finding, opening and verifying artifacts. Nothing here imports torch until tensors are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.files import os_fault, sha256_file, target_of
from dqtool.artifacts.manifest import Manifest, canonical_json
from dqtool.artifacts.reading import MANIFEST_BYTES, parse_json, read_file
from dqtool.artifacts.records import records_of
from dqtool.artifacts.tensorfile import load_tensors, read_bytes, read_header
from dqtool.artifacts.verified import has_digest
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError

if TYPE_CHECKING:
    import torch

__all__ = [
    "ATTACHMENT",
    "DIRECTORY_MANIFEST",
    "Artifact",
    "check_writable",
    "fingerprint",
    "is_current",
    "manifest_path",
    "open_artifact",
    "read_manifest",
]

DIRECTORY_MANIFEST = "dqtool.json"
ATTACHMENT = "file."
"""Before the name of a tensor that is a file (a pipeline's other components), uint8."""

_COMMANDS = {
    "dilate": "dqtool dilate MODEL",
    "calibrate": "dqtool calibrate DILATED",
    "distill": "dqtool distill CALIBRATED",
    "export": "dqtool export DISTILLED",
    "eval": "dqtool eval ARTIFACT",
}


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Where the manifest of an artifact is: X.json for X.safetensors, DIR/dqtool.json, the report X.json itself."""
    path = Path(path)
    if path.is_dir():
        return path / DIRECTORY_MANIFEST
    # Only the known suffix is replaced: `a.v2` and `a.v3` are two artifacts.
    return (
        path.with_suffix(".json") if path.suffix in (".safetensors", ".json") else path.with_name(path.name + ".json")
    )


def fingerprint(stage: str, code_version: int, parameters: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Hex digest of all that decides an artifact: two runs with the same one would write the same bytes.

    `code_version` is the stage's own, raised whenever its output changes; `inputs` are the sha256 of its inputs, in
    order. `parameters` must be plain JSON values.
    """
    identity = {
        "stage": stage,
        "code_version": code_version,
        "parameters": dict(parameters),
        "inputs": list(inputs),
    }
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """An artifact whose data was found to match its manifest."""

    path: Path
    given: str  # as the user typed it, for messages and standard output
    manifest: Manifest

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def sha256(self) -> str:
        """Hex digest of the data: of the file, of a directory's list of file digests, of a report's JSON."""
        if self.manifest.file is not None:
            return str(self.manifest.file["sha256"])
        if self.manifest.files is not None:
            return hashlib.sha256(canonical_json(self.manifest.files).encode()).hexdigest()
        return sha256_file(self.path)

    def tensor_names(self, file: str | None = None) -> list[str]:
        """Sorted names of the tensors, read from the header without torch; `file` as in `tensors`."""
        return sorted(name for name in read_header(self._data(file)) if not name.startswith(ATTACHMENT))

    def tensors(self, device: str = "cpu", *, file: str | None = None) -> dict[str, torch.Tensor]:
        """All tensors on `device`; of a directory, those of the safetensors file `file` (a path relative to it).

        On the CPU they are views of the mapped file. Raises `ArtifactError` when the file is damaged or the artifact
        holds no such file.
        """
        found = load_tensors(self._data(file), device)
        return {name: tensor for name, tensor in found.items() if not name.startswith(ATTACHMENT)}

    def attachments(self) -> dict[str, torch.Tensor]:
        """Files that travel with a safetensors artifact, by relative path: their bytes as uint8, views of the mapped
        file. None of them count as the network's tensors."""
        if self.manifest.file is None:
            return {}
        found = load_tensors(self._data(None))
        return {n.removeprefix(ATTACHMENT): t for n, t in found.items() if n.startswith(ATTACHMENT)}

    def attachment_names(self) -> list[str]:
        """Relative paths of the attachments; of a directory, of all its files."""
        if self.manifest.files is not None:
            return sorted(self.manifest.files)
        names = read_header(self.path) if self.manifest.file is not None else ()
        return sorted(name.removeprefix(ATTACHMENT) for name in names if name.startswith(ATTACHMENT))

    def attachment(self, name: str) -> bytes:
        """One of them, read without torch."""
        if self.manifest.files is not None:
            return (self.path / name).read_bytes()
        return read_bytes(self.path, ATTACHMENT + name)

    def attachment_bytes(self) -> int:
        """How much of a safetensors artifact's file they take."""
        header = read_header(self.path) if self.manifest.file is not None else {}
        return sum(entry["shape"][0] for name, entry in header.items() if name.startswith(ATTACHMENT))

    def _data(self, file: str | None) -> Path:
        if self.manifest.file is not None and file is None:
            return self.path
        if self.manifest.files is not None and file in self.manifest.files:
            return self.path / file
        what = "This artifact is a report and holds no tensors" if self.manifest.files is None else ""
        raise ArtifactError(what or f"The exported directory lists no file {file}", where=self.given)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the artifact at `path`, its data not verified.

    Raises `EnvironmentFault` when nothing is at `path`, `ArtifactError` when it has no valid manifest.
    """
    given = os.fspath(path)
    if not os.path.lexists(path):
        raise EnvironmentFault("There is no such file or directory", where=given, fix="Check the path")
    note = manifest_path(path)
    try:
        text = read_file(note, MANIFEST_BYTES) if note.exists() and not note.is_dir() else None
    except OSError as error:
        raise os_fault(error, note) from error
    if text is None:
        raise ArtifactError(
            f"This is no dqtool artifact: it has no manifest ({note.name})",
            where=given,
            fix="Give the output of a dqtool stage; a model enters the chain through `dqtool dilate MODEL`",
        )
    manifest = Manifest.from_json(text, str(note))
    records_of(manifest, str(note))
    is_report = manifest.file is None and manifest.files is None
    if Path(path) == note and not is_report:
        raise ArtifactError(
            "This is a manifest, not the artifact it describes",
            where=given,
            fix=f"Give {note.with_suffix('.safetensors')}" if manifest.file else f"Give the directory {note.parent}",
        )
    if Path(path).is_dir() != (manifest.files is not None) or (Path(path) != note and is_report):
        raise ArtifactError("The manifest describes something else than what is here", where=f"{given}, {note.name}")
    return manifest


def open_artifact(path: str | os.PathLike[str], stages: Collection[str] | None = None) -> Artifact:
    """The artifact at `path` (file, exported directory or report), its data verified against its manifest.

    Raises `EnvironmentFault` when nothing is at `path` or it can't be read; `ArtifactError` when it has no valid
    manifest, its bytes are not those the manifest names, or its stage is not one of `stages`.
    """
    given = os.fspath(path)
    manifest = read_manifest(path)
    if stages is not None and manifest.stage not in stages:
        wanted = [stage for stage in _COMMANDS if stage in stages]
        raise ArtifactError(
            f"This is the output of `{manifest.stage}`, and the output of {_either(wanted)} is needed",
            where=given,
            fix=f"Make it with {_either([_COMMANDS[stage] for stage in wanted])}",
        )
    if stages is not None:
        records_of(manifest, str(manifest_path(path)), whole=True)
    if manifest.file is not None:
        _verify(Path(path), given, manifest.file)
    for name, entry in (manifest.files or {}).items():
        _verify(Path(path) / name, os.path.join(given, name), entry)
    return Artifact(Path(path), given, manifest)


def is_current(path: str | os.PathLike[str], fingerprint: str) -> bool:
    """Whether `path` already holds, undamaged, what a run with this fingerprint would write."""
    try:
        # The fingerprint is compared first: hashing a large file for nothing takes seconds.
        return read_manifest(path).fingerprint == fingerprint and bool(open_artifact(path))
    except (DqtoolError, OSError):
        return False


def check_writable(
    path: str | os.PathLike[str],
    *,
    directory: bool = False,
    report: bool = False,
    manifest: bool = True,
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Raise before any long work what would fail at its end, or destroy something, when `path` is written.

    A safetensors artifact is to be written, or a directory, or a report (one JSON), or without `manifest` a file of
    another kind that gets none. `EnvironmentFault` when the parent directory is missing or not
    writable, when a file is where a directory belongs or the reverse, or when something dqtool did not write, or
    wrote as something else, would be overwritten; `UsageError` when `path` is one of `inputs` or has the
    suffix of the other kind of file.
    """
    target, given = target_of(path), os.fspath(path)
    if not directory and (target.suffix == ".json") != report:
        kind, suffix = ("A report", ".json") if report else ("A safetensors artifact", ".safetensors")
        raise UsageError(f"{kind} can not have this name", where=given, fix=f"Give a name that ends in {suffix}")
    try:
        if not target.parent.is_dir():
            missing = not os.path.lexists(target.parent)
            raise EnvironmentFault(
                "The directory to write into does not exist" if missing else "A file is where a directory is needed",
                where=str(target.parent),
                fix="Make it with mkdir -p, or choose another place with -o" if missing else "Choose another -o",
            )
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise EnvironmentFault(
                "The directory to write into is not writable",
                where=str(target.parent),
                fix="Choose another place with -o, or make it writable",
            )
        for source in inputs:
            if os.path.exists(source) and os.path.exists(target) and os.path.samefile(source, target):
                raise UsageError(
                    "The output would overwrite its own input", where=given, fix="Choose another name with -o"
                )
        if directory:
            _check_replaceable_directory(target, given)
        else:
            _check_replaceable_file(target, given, manifest=manifest)
    except OSError as error:
        raise os_fault(error, path) from error


def _check_replaceable_directory(target: Path, given: str) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise EnvironmentFault(
            "This exists and is not a directory", where=given, fix="A directory is written here; choose another -o"
        )
    present = [entry for entry in target.rglob("*") if not entry.is_dir()]
    if not present and not any(target.iterdir()):
        return
    if not (target / DIRECTORY_MANIFEST).is_file():
        raise EnvironmentFault(
            "This directory holds files and dqtool did not make it, so it is not replaced",
            where=given,
            fix="Choose a new directory with -o, or empty this one",
        )
    try:
        listed = read_manifest(target).files or {}
    except DqtoolError:
        return  # a damaged directory of ours: nothing says which files are not
    for entry in sorted(present):
        name = entry.relative_to(target).as_posix()
        if name not in listed and name != DIRECTORY_MANIFEST:
            raise EnvironmentFault(
                f"This directory holds a file that dqtool did not write ({name}), so it is not replaced",
                where=given,
                fix="Move the file away, or choose a new directory with -o",
            )


def _check_replaceable_file(target: Path, given: str, *, manifest: bool) -> None:
    if target.is_dir():
        raise EnvironmentFault(
            "This is a directory, and a file is to be written", where=given, fix="Name a file with -o"
        )
    if os.path.lexists(target) and not target.is_file():
        raise EnvironmentFault("This is no ordinary file", where=given, fix="Name another file with -o")
    note = manifest_path(target)
    found = _kind_of_json(note)
    # A report is written under the name the user typed. A manifest's name is derived, and nobody expects a diffusers
    # config.json to vanish because the weights are called config.safetensors.
    if note == target and found == "artifact":
        raise EnvironmentFault(
            "This JSON is the manifest of an artifact and would be overwritten",
            where=given,
            fix="Name another file with -o",
        )
    if manifest and note != target and found in ("foreign", "report"):
        raise EnvironmentFault(
            "The manifest that belongs to this output would overwrite a file that is something else",
            where=str(note),
            fix="Name another file with -o, or move that file away",
        )


def _kind_of_json(path: Path) -> str:
    if not os.path.lexists(path):
        return "absent"
    try:
        payload = parse_json(read_file(path, MANIFEST_BYTES))
    except ArtifactError:  # a directory, a device, or far too large for a manifest
        return "foreign"
    except ValueError:
        return "damaged"
    if not isinstance(payload, dict) or not str(payload.get("format")).startswith("dqtool/"):
        return "foreign"
    return "artifact" if "file" in payload or "files" in payload else "report"


def _verify(path: Path, given: str, entry: Mapping[str, Any]) -> None:
    fix = "Make it again with the dqtool stage that wrote it, or restore the file"
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError("A file that the manifest lists is missing", where=given, fix=fix) from error
    except OSError as error:
        raise os_fault(error, given) from error
    if size != entry["bytes"]:
        state = "truncated" if size < entry["bytes"] else "changed"
        raise ArtifactError(
            f"The file is {state}: it has {size} bytes and its manifest says {entry['bytes']}", where=given, fix=fix
        )
    if not has_digest(path, entry["sha256"]):
        raise ArtifactError(
            "The file was changed after dqtool wrote it: its sha256 is not the manifest's", where=given, fix=fix
        )


def _either(words: Sequence[str]) -> str:
    return " or ".join(f"`{word}`" for word in words)

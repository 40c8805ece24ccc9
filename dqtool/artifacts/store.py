"""Finding, opening and verifying artifacts. Nothing here imports torch until tensors are asked for."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool.artifacts.completeness import check_complete
from dqtool.artifacts.files import os_fault, sha256_file
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.manifest import Manifest, canonical_json
from dqtool.artifacts.names import check_name, path_within
from dqtool.artifacts.reading import FILE_BYTES, MANIFEST_BYTES, read_file
from dqtool.artifacts.records import FileRecord, InputRecord, StageRecord
from dqtool.artifacts.schema import json_of
from dqtool.artifacts.tensorfile import load_tensors, read_bytes, read_header
from dqtool.artifacts.verified import has_digest
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault

if TYPE_CHECKING:
    import torch

__all__ = [
    "ATTACHMENT",
    "CARD",
    "DIRECTORY_MANIFEST",
    "Artifact",
    "fingerprint",
    "is_current",
    "manifest_path",
    "open_artifact",
    "read_manifest",
]

DIRECTORY_MANIFEST = "dqtool.json"
CARD = "README.md"
"""Model card of an exported directory. Its owner may edit it: it is not verified."""
ATTACHMENT = "file."
"""Before the name of a tensor that is a file (a pipeline's other components), uint8."""

_COMMANDS = {
    "dilate": "dqtool dilate MODEL",
    "calibrate": "dqtool calibrate DILATED",
    "distill": "dqtool distill CALIBRATED",
    "export": "dqtool export DISTILLED",
    "eval": "dqtool eval ARTIFACT",
    "sensitivity": "dqtool sensitivity CALIBRATED",
}


def manifest_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of an artifact's manifest: X.json for X.safetensors, DIR/dqtool.json, the report X.json itself."""
    path = Path(path)
    if path.is_dir():
        return path / DIRECTORY_MANIFEST
    # Only the known suffix is replaced: `a.v2` and `a.v3` are two artifacts.
    return (
        path.with_suffix(".json") if path.suffix in (".safetensors", ".json") else path.with_name(path.name + ".json")
    )


def fingerprint(stage: str, code_version: int, parameters: JsonObject, inputs: Sequence[str]) -> str:
    """Return the hex digest of all that decides an artifact: two runs with the same one would write the same bytes.

    `code_version` is the stage's own, raised whenever its output changes; `inputs` are the identities of its inputs, in
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
    given: str  # path as the user typed it, for messages and standard output
    manifest: Manifest

    @property
    def stage(self) -> str:
        return self.manifest.stage

    @property
    def sha256(self) -> str:
        """Return the hex digest of the data: of the file, of a directory's list of file digests, of a report's JSON."""
        if self.manifest.file is not None:
            return self.manifest.file.sha256
        if self.manifest.files is not None:
            return hashlib.sha256(canonical_json(json_of(self.manifest.files)).encode()).hexdigest()
        return sha256_file(self.path)

    def as_input(self) -> InputRecord:
        """Return how the next stage records this artifact as its input, with the stages that made it."""
        own = StageRecord(self.stage, self.manifest.version, self.manifest.parameters)
        earlier = self.manifest.inputs[0].history if self.manifest.inputs else []
        return InputRecord(self.given, self.sha256, self.stage, [*earlier, own], self._described())

    def _described(self) -> str:
        """Return the digest of what the manifest says of the network, its pipeline and its sampling, but for where they lie."""
        network = {
            name: value for name, value in json_of(self.manifest.network).items() if not name.startswith("source")
        }
        said = {"network": network, "pipeline": json_of(self.manifest.pipeline)}
        return hashlib.sha256(canonical_json(said).encode()).hexdigest()

    def tensor_names(self, file: str | None = None) -> list[str]:
        """Return the sorted names of the tensors, read from the header without torch; `file` as in `tensors`."""
        return sorted(name for name in read_header(self._data(file)) if not name.startswith(ATTACHMENT))

    def tensors(self, device: str = "cpu", *, file: str | None = None) -> dict[str, torch.Tensor]:
        """Return all tensors on `device`; of a directory, those of the safetensors file `file` (a path relative to it).

        On the CPU they are views of the mapped file. Raises `ArtifactError` when the file is damaged or the artifact
        holds no such file.
        """
        found = load_tensors(self._data(file), device)
        return {name: tensor for name, tensor in found.items() if not name.startswith(ATTACHMENT)}

    def attachments(self) -> dict[str, torch.Tensor]:
        """Return the files that travel with a safetensors artifact, by relative path: their bytes as uint8, views of the mapped
        file. They don't count as tensors of the network. Raises what `attachment_names` raises."""
        if self.manifest.file is None:
            return {}
        found = load_tensors(self._data(None))
        return {name: found[ATTACHMENT + name] for name in self.attachment_names()}

    def attachment_names(self) -> list[str]:
        """Return the relative paths of the attachments; of a directory, of all its files.

        Raises `ArtifactError` for a name that leads elsewhere, or for two names of which one is a directory of the other.
        """
        if self.manifest.files is not None:
            return sorted(self.manifest.files)
        names = read_header(self.path) if self.manifest.file is not None else ()
        found = {name.removeprefix(ATTACHMENT) for name in names if name.startswith(ATTACHMENT)}
        for name in found:
            parts = check_name(name, self.given)
            if any("/".join(parts[:depth]) in found for depth in range(1, len(parts))):
                raise ArtifactError("A file of this artifact lies in another file", where=f"{self.given}, {name}")
        return sorted(found)

    def attachment(self, name: str) -> bytes:
        """Return one attachment, read without torch."""
        if self.manifest.files is not None:
            return read_file(self._data(name), FILE_BYTES)
        return read_bytes(self.path, ATTACHMENT + name)

    def attachment_bytes(self) -> int:
        """Return the bytes that attachments take of a safetensors artifact's file."""
        header = read_header(self.path) if self.manifest.file is not None else {}
        return sum(entry["shape"][0] for name, entry in header.items() if name.startswith(ATTACHMENT))

    def _data(self, file: str | None) -> Path:
        if self.manifest.file is not None and file is None:
            return self.path
        if self.manifest.files is not None and file in self.manifest.files:
            return path_within(self.path, file, self.given, links=self.path)
        what = "This artifact is a report and holds no tensors" if self.manifest.files is None else ""
        raise ArtifactError(what or f"The exported directory lists no file {file}", where=self.given)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of the artifact at `path`, its data not verified.

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
    """Open the artifact at `path` (file, exported directory or report), its data verified against its manifest.

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
        check_complete(manifest, str(manifest_path(path)))
    if manifest.file is not None:
        _verify(Path(path), given, manifest.file)
    for name, entry in (manifest.files or {}).items():
        if name == CARD:
            continue
        _verify(path_within(path, name, given, links=Path(path)), os.path.join(given, name), entry)
    return Artifact(Path(path), given, manifest)


def is_current(path: str | os.PathLike[str], fingerprint: str) -> bool:
    """Return whether `path` already holds the undamaged output of a run with this fingerprint."""
    try:
        # The fingerprint is compared first: hashing a large file for nothing takes seconds.
        return read_manifest(path).fingerprint == fingerprint and bool(open_artifact(path))
    except (DqtoolError, OSError):
        return False


def _verify(path: Path, given: str, entry: FileRecord) -> None:
    fix = "Make it again with the dqtool stage that wrote it, or restore the file"
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ArtifactError("A file that the manifest lists is missing", where=given, fix=fix) from error
    except OSError as error:
        raise os_fault(error, given) from error
    if size != entry.bytes:
        state = "truncated" if size < entry.bytes else "changed"
        raise ArtifactError(
            f"The file is {state}: it has {size} bytes and its manifest says {entry.bytes}", where=given, fix=fix
        )
    if not has_digest(path, entry.sha256):
        raise ArtifactError(
            "The file was changed after dqtool wrote it: its sha256 is not the manifest's", where=given, fix=fix
        )


def _either(words: Sequence[str]) -> str:
    return " or ".join(f"`{word}`" for word in words)

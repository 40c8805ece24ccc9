"""The manifest: the JSON beside an artifact and the only place that says what the artifact is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.manifest_reading import records_of
from dqtool.artifacts.reading import parse_json
from dqtool.artifacts.records import (
    EnvironmentRecord,
    EvalRecord,
    FileRecord,
    InputRecord,
    LayerRecord,
    MetricsRecord,
    ModelRecord,
    ParametersRecord,
    PipelineRecord,
    SamplingRecord,
)
from dqtool.artifacts.schema import json_of, unchecked
from dqtool.errors import ArtifactError, NumericError

__all__ = [
    "FORMAT",
    "REPORTS",
    "STAGES",
    "Manifest",
    "canonical_json",
    "dqtool_version",
    "environment",
    "installed_versions",
    "package_version",
]

FORMAT = "dqtool/1"
STAGES = ("dilate", "calibrate", "distill", "export", "eval", "sensitivity")
REPORTS = ("eval", "sensitivity")
"""Stages whose manifest stands alone, without a file of tensors."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_REMAKE = "Make the artifact again, or restore the manifest that was written with it"


def package_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def dqtool_version() -> str:
    """Return the installed version of dqtool; `0+unknown` when run from a tree that was never installed."""
    return package_version("dqtool") or "0+unknown"


@dataclass
class Manifest:
    """Description of an artifact and of how it was made.

    `file` ({name, bytes, sha256}) stands for an artifact of one file, `files` ({relative path: {bytes, sha256}}) for
    a directory; a report (`REPORTS`) is its own manifest and has neither. Both are filled in by the commit. The JSON
    has one more key, `checksum`, over all others; an edited manifest does not match it.
    """

    stage: str
    fingerprint: str  # digest of stage, code version, parameters and inputs: see dqtool.artifacts.fingerprint
    inputs: list[InputRecord] = field(default_factory=list)
    model: ModelRecord | None = None  # None for a report on something else
    pipeline: PipelineRecord | None = None  # None for a bare component
    parameters: ParametersRecord = field(default_factory=ParametersRecord)  # every one, resolved
    layers: list[LayerRecord] = field(default_factory=list)
    metrics: MetricsRecord = field(default_factory=MetricsRecord)
    environment: EnvironmentRecord = field(default_factory=EnvironmentRecord)
    seconds: float = 0.0  # wall-clock time the stage took
    version: str = field(default_factory=dqtool_version)
    format: str = FORMAT
    file: FileRecord | None = None
    files: dict[str, FileRecord] | None = None

    @property
    def network(self) -> ModelRecord:
        """Record of the network.

        Raises:
            ArtifactError: the manifest describes no network.
        """
        if self.model is None:
            raise ArtifactError("The manifest describes no network", where="manifest, key model", fix=_REMAKE)
        return self.model

    @property
    def sampling(self) -> SamplingRecord | None:
        """Sampler, steps, guidance and conditions of the calibration; None before it."""
        return None if self.pipeline is None else self.pipeline.sampling

    @property
    def evaluation(self) -> EvalRecord:
        """Metrics of an eval report.

        Raises:
            ArtifactError: the manifest is of another stage.
        """
        if not isinstance(self.metrics, EvalRecord):
            raise ArtifactError(f"This is the manifest of `{self.stage}`'s output, not an eval result")
        return self.metrics

    def to_json(self) -> str:
        """Return the manifest as text: sorted keys, indent 1, trailing newline.

        Raises `NumericError` that names the key when a value is NaN or infinite, which JSON can't hold.
        """
        payload = {key: json_of(getattr(self, key)) for key in _TYPES}
        payload["model"] = payload["model"] or {}
        payload |= {key: json_of(getattr(self, key)) for key in ("file", "files") if getattr(self, key) is not None}
        _refuse_non_finite(payload, "")
        # Through JSON once, so that the checksum sees what a reader will see (lists for tuples, text keys).
        payload = json.loads(json.dumps(payload))
        payload["checksum"] = _checksum(payload)
        return json.dumps(payload, sort_keys=True, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> Manifest:
        """Parse a manifest's text; `where` is its path, for messages.

        Raises `ArtifactError` that names the file and the key for whatever is malformed, of a newer format, or
        changed since dqtool wrote it.
        """
        try:
            payload = parse_json(text)
        except ValueError as error:
            raise ArtifactError(f"The manifest is no valid JSON: {error}", where=where, fix=_REMAKE) from error
        if not isinstance(payload, dict):
            raise ArtifactError("The manifest is no JSON object", where=where, fix=_REMAKE)
        _check_format(payload.get("format"), where)
        for key, problem in _problems(payload):
            raise ArtifactError(f"The manifest is malformed: {problem}", where=f"{where}, key {key}", fix=_REMAKE)
        checksum = payload.pop("checksum")
        if checksum != _checksum(payload):
            raise ArtifactError(
                "The manifest was changed after dqtool wrote it", where=f"{where}, key checksum", fix=_REMAKE
            )
        records = records_of(payload, payload["stage"], where)
        own = {item.name: getattr(records, item.name) for item in dataclasses.fields(records)}
        return cls(**{**payload, **own})


def environment(device: str = "cpu", threads: int | None = None, processes: int = 1) -> EnvironmentRecord:
    """Return the versions of packages, the platform, and the device, thread count and number of processes of the caller."""
    import platform

    versions = {"python": platform.python_version(), "dqtool": dqtool_version()}
    versions |= installed_versions(("torch", "diffusers"))
    found = {"versions": versions, "platform": platform.platform(), "device": device, "threads": threads}
    if processes > 1:
        found["processes"] = processes
    return unchecked(found, EnvironmentRecord)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {package: package_version(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}


def canonical_json(value: Any) -> str:
    """Return the one text of a JSON value that hashes are taken of; raise `ValueError` for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "stage": (str,),
    "version": (str,),
    "inputs": (list,),
    "model": (dict,),
    "pipeline": (dict, type(None)),
    "parameters": (dict,),
    "layers": (list,),
    "metrics": (dict,),
    "fingerprint": (str,),
    "environment": (dict,),
    "seconds": _NUMBER,
}
_WORDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


def _checksum(payload: JsonObject) -> str:
    return hashlib.sha256(canonical_json(payload).encode()).hexdigest()


def _check_format(value: object, where: str) -> None:
    number = re.fullmatch(r"dqtool/([1-9][0-9]*)", value) if isinstance(value, str) else None
    if number is None:
        raise ArtifactError(
            "This JSON is no dqtool manifest", where=f"{where}, key format", fix="Give an artifact that dqtool made"
        )
    if value != FORMAT:
        raise ArtifactError(
            f"This artifact was written by a newer dqtool (format {value}; this one reads {FORMAT})",
            where=f"{where}, key format",
            fix="Upgrade dqtool",
        )


def _problems(payload: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Yield (key, what is wrong with it) for all that is wrong, in the order in which it is worth reporting."""
    found = [(key, "the key is missing") for key in (*_TYPES, "checksum") if key not in payload]
    known = {*_TYPES, "checksum", "file", "files"}
    found += [(key, "the key is unknown") for key in payload if key not in known]
    for key, types in {**_TYPES, "checksum": (str,), "file": (dict,), "files": (dict,)}.items():
        if key in payload and (not isinstance(payload[key], types) or isinstance(payload[key], bool)):
            found.append((key, f"it must be {' or '.join(_WORDS[kind] for kind in types)}"))
    if found:
        return found
    if payload["stage"] not in STAGES:
        found.append(("stage", f"it must be one of {', '.join(STAGES)}"))
    if not _is_sha256(payload["fingerprint"]):
        found.append(("fingerprint", "it must be 64 hexadecimal digits"))
    if payload["seconds"] < 0:
        found.append(("seconds", "it must not be negative"))
    if "file" in payload and "files" in payload:
        found.append(("files", "an artifact is one file or a directory, not both"))
    if "file" not in payload and "files" not in payload and payload["stage"] not in REPORTS:
        found.append(("file", "the key is missing"))
    if "file" in payload:
        found += _file_problems("file", payload["file"], named=True)
    for path, entry in payload.get("files", {}).items():
        if not path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            found.append((f"files.{path}", "the path leaves the directory"))
        found += _file_problems(f"files.{path}", entry, named=False)
    for number, entry in enumerate(payload["inputs"]):
        key = f"inputs[{number}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            found.append((key, "it must be an object with a name"))
        elif not _is_sha256(entry.get("sha256")):
            found.append((f"{key}.sha256", "it must be 64 hexadecimal digits"))
        elif not isinstance(entry.get("stage", 0), (str, type(None))):
            found.append((f"{key}.stage", "it must be text or null"))
    for number, entry in enumerate(payload["layers"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            found.append((f"layers[{number}]", "it must be an object with a name"))
    return found


def _file_problems(key: str, entry: object, *, named: bool) -> list[tuple[str, str]]:
    if not isinstance(entry, dict):
        return [(key, "it must be an object")]
    found = []
    if named and not isinstance(entry.get("name"), str):
        found.append((f"{key}.name", "it must be text"))
    size = entry.get("bytes")
    if type(size) is not int or size < 0:
        found.append((f"{key}.bytes", "it must be a whole number of bytes"))
    if not _is_sha256(entry.get("sha256")):
        found.append((f"{key}.sha256", "it must be 64 hexadecimal digits"))
    return found


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _refuse_non_finite(value: object, key: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise NumericError(
            f"A value of the manifest is {value}",
            where=f"key {key}",
            fix="A measurement that gives NaN or infinity points to a diverged model; check the stages before",
        )
    if isinstance(value, dict):
        for name, item in value.items():
            _refuse_non_finite(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _refuse_non_finite(item, f"{key}[{number}]")

"""Search for eval results, and the artifacts that they measured. Imports no torch.

Artifacts are identified by their sha256, never by their name: a result is joined with the files it was measured on, or with
none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqtool.artifacts import DIRECTORY_MANIFEST, Artifact, Manifest, manifest_path, open_artifact, sha256_file
from dqtool.artifacts.bench_report import BenchReport
from dqtool.artifacts.files import os_fault
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.named import may_read
from dqtool.artifacts.names import path_within
from dqtool.artifacts.reading import MANIFEST_BYTES, check_regular, parse_json, read_file
from dqtool.artifacts.records import EvalRecord, InputRecord
from dqtool.artifacts.schema import record
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault
from dqtool.page.comparison import FORMAT as TABLE_FORMAT
from dqtool.page.comparison import REFERENCE

__all__ = ["Bench", "Result", "chain_key", "differences", "find_results", "find_tables"]

LARGEST_JSON = 64 << 20
LARGEST_PICTURE = 8 << 20
"""Largest JSON file that is read, and largest picture that is embedded, in bytes."""


@dataclass
class Result:
    """An eval result with the artifacts of its chain that were found."""

    name: str
    path: Path
    manifest: Manifest
    chain: dict[str, Path] = field(default_factory=dict)  # path of the artifact of each stage
    manifests: dict[str, Manifest] = field(default_factory=dict)  # manifest of the artifact of each stage
    picture: Path | None = None
    picture_note: str = ""
    bits: str = ""  # the column `bits` of the table, such as `4/4`

    @property
    def metrics(self) -> EvalRecord:
        """Figures that `dqtool eval` recorded."""
        return self.manifest.evaluation

    @property
    def source_sha256(self) -> str | None:
        """Digest of the full-precision model."""
        return None if self.manifest.model is None else self.manifest.model.source_sha256

    @property
    def figures(self) -> JsonObject:
        """Metrics by key, the figures among them."""
        return self.metrics.as_read

    @property
    def measured_sha256(self) -> str:
        """Digest (sha256) of the measured artifact."""
        return self.manifest.inputs[0].sha256 if self.manifest.inputs else ""

    @property
    def quantized_reference(self) -> str | None:
        """Description, by eval, of a reference other than the full-precision model; None if there is no other."""
        return self.metrics.reference_is

    def open(self, stage: str) -> Artifact:
        """Open the artifact of a stage, and verify its data.

        Raises:
            ArtifactError: there is none next to the result, or it is damaged.
            EnvironmentFault: it can't be read.
        """
        if stage not in self.chain:
            raise ArtifactError(f"the {_PARTICIPLES[stage]} artifact of this result was not found next to it")
        return open_artifact(self.chain[stage])

    def picture_uri(self) -> str | None:
        """Return the sample grid as a data URI; None if there is none or it is too large to embed."""
        if self.picture is None or self.picture.stat().st_size > LARGEST_PICTURE:
            return None
        return "data:image/png;base64," + base64.b64encode(read_file(self.picture, LARGEST_PICTURE)).decode("ascii")


@dataclass
class Bench:
    """A report of `dqtool bench -o`."""

    path: Path
    report: BenchReport

    @property
    def sha256(self) -> str:
        """Digest (sha256) of the exported directory that was timed."""
        return self.report.model.sha256


_GIVE = "Give a file that `dqtool eval -o FILE.json` wrote, or its directory"
_PARTICIPLES = {"dilate": "dilated", "calibrate": "calibrated", "distill": "distilled", "export": "exported"}


@dataclass
class _Found:
    """Files found in the searched places; artifacts by sha256."""

    evals: list[tuple[Path, Manifest]] = field(default_factory=list)
    artifacts: dict[str, tuple[Path, Manifest]] = field(default_factory=dict)
    benches: list[Bench] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of files that a page can show."""
        return len(self.evals) + len(self.benches) + len(self.tables)


def find_results(places: Sequence[str]) -> tuple[list[Result], list[Bench]]:
    """Return every eval result and benchmark report in `places`: files, and directories with all below them.

    Raises:
        EnvironmentFault: there is no such place, or it can't be read.
        ArtifactError: a place holds no eval result, or a damaged one.
    """
    asked, around = _Found(), _Found()
    for place in places:
        path = Path(place)
        if not os.path.lexists(path):
            raise EnvironmentFault("There is no such file or directory", where=place, fix="Check the path")
        before = len(asked)
        if path.is_dir():
            _search(path, asked)
        else:
            _take(path, asked, required=True)
            # Artifacts of its chain are searched next to it. Other results there were not asked for, so their faults do
            # not count.
            _search(path.absolute().parent, around, strict=False, deep=False)
        if len(asked) == before:
            raise ArtifactError(
                "There is no eval result here",
                where=place,
                fix="Write one with `dqtool eval ARTIFACT -o FILE.json`, or give a directory that `dqtool run` wrote",
            )
    found = _Found(asked.evals, around.artifacts | asked.artifacts, asked.benches, asked.pictures + around.pictures)
    unique = {path.resolve(): (path, manifest) for path, manifest in found.evals}
    results = [Result(name, *unique[key]) for key, name in zip(unique, _names(list(unique)), strict=True)]
    for result in results:
        _join_chain(result, found)
        _join_picture(result, found)
    benches = list({bench.path.resolve(): bench for bench in found.benches}.values())
    return results, benches


def find_tables(places: Sequence[str]) -> list[dict[str, Any]]:
    """Return every table of comparisons in `places` (existing files or directories), sorted by name, without copies."""
    found = _Found()
    for place in map(Path, places):
        if place.is_dir():
            _search(place, found, strict=False)
        else:
            _take(place, found, strict=False)
    unique = {json.dumps(table, sort_keys=True): table for table in found.tables}
    return sorted(unique.values(), key=lambda table: table["name"])


def _search(directory: Path, found: _Found, strict: bool = True, deep: bool = True) -> None:
    """Collect every JSON and PNG below `directory`. An exported directory counts as one artifact."""

    def unreadable(error: OSError) -> None:
        raise os_fault(error, error.filename or directory) from error

    for root, folders, files in os.walk(directory, onerror=unreadable if strict else None):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if DIRECTORY_MANIFEST in files:
            folders[:] = []
            _take(Path(root) / DIRECTORY_MANIFEST, found, strict=strict)
            continue
        if not deep:
            exports = [Path(root) / name / DIRECTORY_MANIFEST for name in folders]
            folders[:] = []
            for note in filter(Path.is_file, exports):
                _take(note, found, strict=strict)
        for name in sorted(files):
            if name.endswith(".json"):
                _take(Path(root) / name, found, strict=strict)
            elif name.endswith(".png"):
                found.pictures.append(Path(root) / name)


def _take(path: Path, found: _Found, required: bool = False, strict: bool = True) -> None:
    """Add a JSON file to `found` by its kind. Foreign files are ignored, unless the user gave this one (`required`)."""
    try:
        if check_regular(path).st_size > LARGEST_JSON:
            if required:
                raise ArtifactError("This file is not an eval result", where=str(path), fix=_GIVE)
            return
        text = read_file(path, LARGEST_JSON)
    except DqtoolError:
        if strict:
            raise
        return
    try:
        payload = parse_json(text)
    except (ValueError, RecursionError) as error:
        if not strict:
            return
        if required and path.suffix != ".json":
            raise ArtifactError("This file is not an eval result", where=str(path), fix=_GIVE) from error
        raise ArtifactError(
            f"This is not valid JSON: {error}",
            where=str(path),
            fix="Write it again, move it away, or give the reports to show one by one",
        ) from error
    if isinstance(payload, dict) and {"speed", "machine", "model", "load"} <= payload.keys():
        try:
            found.benches.append(Bench(path, record(payload, BenchReport)))
        except ValueError as error:
            if strict:
                wrong = error.args[0]
                raise ArtifactError(
                    f"This benchmark report is malformed: {wrong.key} must be {wrong.what}",
                    where=str(path),
                    fix="Write it again with `dqtool bench -o FILE.json`, or move it away",
                ) from error
        return
    if isinstance(payload, dict) and payload.get("format") == TABLE_FORMAT:
        found.tables.append(payload)
        return
    if not isinstance(payload, dict) or not str(payload.get("format", "")).startswith("dqtool/"):
        if required:
            raise ArtifactError("This JSON is not an eval result", where=str(path), fix=_GIVE)
        return
    try:
        manifest = Manifest.from_json(text, str(path))
    except ArtifactError:
        if strict:
            raise
        return
    if manifest.stage == "eval":
        found.evals.append((path, manifest))
    elif required:
        raise ArtifactError(
            f"This is the manifest of `{manifest.stage}`'s output, not an eval result",
            where=str(path),
            fix=_GIVE,
        )
    else:
        _file_artifact(path, manifest, found)


def _file_artifact(note: Path, manifest: Manifest, found: _Found) -> None:
    path = note.parent if manifest.files is not None else note.with_suffix(".safetensors")
    if not path.exists():
        return
    found.artifacts[Artifact(path, str(path), manifest).sha256] = (path, manifest)


def _join_chain(result: Result, found: _Found) -> None:
    """Find the chain of a result: follow the inputs' sha256 from the measured artifact back to `dilate`."""
    entry = result.manifest.inputs[0] if result.manifest.inputs else None
    while entry is not None and entry.stage in _PARTICIPLES:
        known = found.artifacts.get(entry.sha256) or _where_it_was(entry, result.path)
        if known is None:
            return
        result.chain[entry.stage], result.manifests[entry.stage] = known
        inputs = known[1].inputs
        entry = inputs[0] if inputs else None


def _where_it_was(entry: InputRecord, beside: Path) -> tuple[Path, Manifest] | None:
    """Return the artifact at the path that the stage after it recorded; None if another one is there now, or it lies
    neither beside the result nor where the user had dqtool write."""
    path = Path(entry.name)
    if not may_read(path, [beside]):
        return None
    note = manifest_path(path)
    try:
        manifest = Manifest.from_json(read_file(note, MANIFEST_BYTES), str(note))
    except (OSError, DqtoolError):
        return None
    return (path, manifest) if Artifact(path, str(path), manifest).sha256 == entry.sha256 else None


def _join_picture(result: Result, found: _Found) -> None:
    """Find the sample grid: the file with the recorded sha256, else a picture with the result's name."""
    recorded = result.metrics.grid
    if recorded is not None and recorded.sha256 is not None:
        given = str(result.manifest.parameters.grid)
        near = [*_beside(result, recorded.file), *([Path(given)] if may_read(given, [result.path]) else [])]
        for path in [*near, *found.pictures]:
            if path.is_file() and sha256_file(path) == recorded.sha256:
                result.picture = path
                return
    namesake = next(iter(_beside(result, f"{result.path.stem}.png")), None)
    if namesake is not None and namesake.is_file():
        result.picture = namesake
        if recorded is not None:
            result.picture_note = f"{namesake.name} is next to the report, but differs from the file that eval wrote."


def _beside(result: Result, name: object) -> list[Path]:
    """Return the path of a file next to the result; nothing for a name or link that leads elsewhere.

    Pages are passed on to others, so they must not embed files from other places.
    """
    try:
        return [path_within(result.path.parent, name, str(result.path), links=result.path.parent)]
    except ArtifactError:
        return []


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """Yield a short name for each path: the file's, or its directory's for `eval.json`; longer if two are equal."""
    parts = [
        [*path.parent.parts, path.stem] if path.stem != "eval" else list(path.parent.parts) or [path.stem]
        for path in paths
    ]
    for own in parts:
        for depth in range(1, len(own) + 1):
            if sum(other[-depth:] == own[-depth:] for other in parts) == 1:
                break
        yield "/".join(own[-depth:])


def chain_key(result: Result) -> str:
    """Return a key that is equal for results that may be compared: of one model, sampled and measured in the same way.

    The number of images is part of it, because the bias of a Fréchet distance depends on it. The seed is not.
    """
    model = result.manifest.model
    identity = {name: value for name, (value, _) in _conditions(result).items()}
    return canonical_json({"model": result.source_sha256 or (model and model.source)} | identity)


def differences(result: Result, others: Sequence[Result]) -> list[str]:
    """Return in words the conditions in which a result differs from `others` of its model."""
    there = [_conditions(other) for other in others]
    own = _conditions(result).items()
    return [said for name, (value, said) in own if any(value != other[name][0] for other in there)]


def _conditions(result: Result) -> dict[str, tuple[Any, str]]:
    """Return by name the conditions that figures depend on besides network and seed: (value, value in words)."""
    given, metrics = result.manifest.parameters, result.metrics
    sampling = result.manifest.sampling
    images, eta = metrics.samples, None if sampling is None else sampling.eta
    steps = given.steps or (None if sampling is None else sampling.steps)
    scheduler = None if sampling is None else sampling.scheduler.get("_class_name")
    guidance = None if sampling is None else sampling.guidance
    if given.guidance is not None:
        guidance = max(float(given.guidance), 1.0)
    sampler, prompts, side, corrected = given.sampler, given.prompts, given.image_size, given.correct_noise
    digest = None if prompts is None else hashlib.sha256(canonical_json(prompts).encode()).hexdigest()
    statistics = given.files.get("ref_stats")
    judged = None if statistics is None else statistics.sha256
    reference = None if result.quantized_reference is None else result.manifest.inputs[1].sha256
    return {
        "images": (images, "no images" if images is None else f"{images} images"),
        "sampler": ([scheduler, sampler], sampler or scheduler or "the pipeline's own sampler"),
        "steps": (steps, f"{steps or 'default'} steps"),
        "eta": (eta, f"eta {eta or 0:g}"),
        "guidance": (guidance, "the model's own guidance" if guidance is None else f"guidance {guidance:g}"),
        "prompts": (digest, _or("the model's own prompts", digest, f"{len(prompts or ())} prompts")),
        "image_size": (side, "whole images" if side is None else f"centres of {side} pixels"),
        "correct_noise": (corrected, f"with{'' if corrected else 'out'} PTQD's correction"),
        "ref_stats": (
            judged,
            _or("no reference statistics", judged, f"reference statistics {statistics and statistics.file}"),
        ),
        "reference": (reference, _or(f"against {REFERENCE}", reference, f"against {result.quantized_reference}")),
    }


def _or(otherwise: str, digest: str | None, said: str) -> str:
    """Return `said` with the start of the digest, or `otherwise` if there is no digest."""
    return otherwise if digest is None else f"{said} ({digest[:12]}…)"

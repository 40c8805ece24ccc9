"""Finding what a page is made of: eval results, and beside them the artifacts they measured. Imports no torch.

Artifacts are told apart by their sha256, never by their name: a result is joined with the very files it was measured on, or
with none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dqtool.artifacts import DIRECTORY_MANIFEST, Artifact, Manifest, manifest_path, open_artifact, sha256_file
from dqtool.artifacts.files import os_fault
from dqtool.artifacts.manifest import canonical_json
from dqtool.artifacts.names import path_within
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault
from dqtool.page.comparison import FORMAT as TABLE_FORMAT
from dqtool.page.comparison import REFERENCE

__all__ = ["Bench", "Result", "chain_key", "differences", "find_results", "find_tables"]

LARGEST_JSON = 64 << 20
LARGEST_PICTURE = 8 << 20
"""Bytes beyond which a file is not looked at, or not embedded."""


@dataclass
class Result:
    """An eval result with what was found of its chain."""

    name: str
    path: Path
    manifest: Manifest
    chain: dict[str, Path] = field(default_factory=dict)  # stage -> where an artifact of this result's chain is
    manifests: dict[str, Manifest] = field(default_factory=dict)  # of the same stages
    picture: Path | None = None
    picture_note: str = ""
    bits: str = ""  # as its table names them, `4/4`

    @property
    def metrics(self) -> dict[str, Any]:
        """The figures that `dqtool eval` recorded."""
        return self.manifest.metrics

    @property
    def measured_sha256(self) -> str:
        """sha256 of what was measured."""
        return str(self.manifest.inputs[0]["sha256"]) if self.manifest.inputs else ""

    @property
    def quantized_reference(self) -> str | None:
        """What took the place of the full-precision model in comparisons, in eval's words; None where nothing did."""
        return self.metrics.get("reference_is")

    def open(self, stage: str) -> Artifact:
        """The artifact of a stage, its data verified.

        Raises:
            ArtifactError: there is none beside the result, or it is damaged.
            EnvironmentFault: it can't be read.
        """
        if stage not in self.chain:
            raise ArtifactError(f"the {_PARTICIPLES[stage]} artifact of this result was not found beside it")
        return open_artifact(self.chain[stage])

    def picture_uri(self) -> str | None:
        """The sample grid as a data URI; None without one, or where it is too large to embed."""
        if self.picture is None or self.picture.stat().st_size > LARGEST_PICTURE:
            return None
        return "data:image/png;base64," + base64.b64encode(self.picture.read_bytes()).decode("ascii")


@dataclass
class Bench:
    """A report of `dqtool bench -o`."""

    path: Path
    report: dict[str, Any]

    @property
    def sha256(self) -> str:
        """sha256 of the exported directory that was timed."""
        return str(self.report["model"].get("sha256", ""))


_GIVE = "Give what `dqtool eval -o FILE.json` wrote, or the directory it is in"
_PARTICIPLES = {"dilate": "dilated", "calibrate": "calibrated", "distill": "distilled", "export": "exported"}


@dataclass
class _Found:
    """What lies in the places looked at, by sha256 where it has one."""

    evals: list[tuple[Path, Manifest]] = field(default_factory=list)
    artifacts: dict[str, tuple[Path, Manifest]] = field(default_factory=dict)
    benches: list[Bench] = field(default_factory=list)
    pictures: list[Path] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        """How much of what a page can show was found."""
        return len(self.evals) + len(self.benches) + len(self.tables)


def find_results(places: Sequence[str]) -> tuple[list[Result], list[Bench]]:
    """Every eval result in `places` (a directory is searched with all below it, a file is taken as it is), and benches.

    Raises:
        EnvironmentFault: nothing is at a place, or it can't be read.
        ArtifactError: a place holds no eval result, or a JSON in it is a damaged one.
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
            # Its chain lies beside it; other results that do were not asked for, and their faults are not ours.
            _search(path.absolute().parent, around, strict=False, deep=False)
        if len(asked) == before:
            raise ArtifactError(
                "There is no eval result here",
                where=place,
                fix="Write one with `dqtool eval ARTIFACT -o FILE.json`, or name a directory that `dqtool run` filled",
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
    """Every table of comparisons in `places` (files or directories that are there), by name; copies of one count once."""
    found = _Found()
    for place in map(Path, places):
        if place.is_dir():
            _search(place, found, strict=False)
        else:
            _take(place, found, strict=False)
    unique = {json.dumps(table, sort_keys=True): table for table in found.tables}
    return sorted(unique.values(), key=lambda table: table["name"])


def _search(directory: Path, found: _Found, strict: bool = True, deep: bool = True) -> None:
    """Look at every JSON and PNG below `directory`; an exported directory counts as one artifact."""

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
    """File one JSON under what it is. Others' JSONs are passed over, unless the user named this one (`required`)."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            if required:
                raise ArtifactError("This file is no eval result", where=str(path), fix=_GIVE)
            return
        text = path.read_bytes()
    except OSError as error:
        if strict:
            raise os_fault(error, path) from error
        return
    try:
        payload = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not strict:
            return
        if required and path.suffix != ".json":
            raise ArtifactError("This file is no eval result", where=str(path), fix=_GIVE) from error
        raise ArtifactError(
            f"This is no valid JSON: {error}",
            where=str(path),
            fix="Make it again, move it away, or name the reports to show one by one",
        ) from error
    if isinstance(payload, dict) and {"speed", "machine", "model", "load"} <= payload.keys():
        found.benches.append(Bench(path, payload))
        return
    if isinstance(payload, dict) and payload.get("format") == TABLE_FORMAT:
        found.tables.append(payload)
        return
    if not isinstance(payload, dict) or not str(payload.get("format", "")).startswith("dqtool/"):
        if required:
            raise ArtifactError("This JSON is no eval result", where=str(path), fix=_GIVE)
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
            f"This is the manifest of `{manifest.stage}`'s output, no eval result",
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
    """Follow the inputs' sha256 from what was measured back to `dilate`."""
    entry: Mapping[str, Any] | None = result.manifest.inputs[0] if result.manifest.inputs else None
    while entry is not None and entry["stage"] in _PARTICIPLES:
        known = found.artifacts.get(entry["sha256"]) or _where_it_was(entry)
        if known is None:
            return
        result.chain[entry["stage"]], result.manifests[entry["stage"]] = known
        inputs = known[1].inputs
        entry = inputs[0] if inputs else None


def _where_it_was(entry: Mapping[str, Any]) -> tuple[Path, Manifest] | None:
    """The artifact at the path its reader recorded, if it still is the one."""
    path = Path(entry["name"])
    note = manifest_path(path)
    try:
        manifest = Manifest.from_json(note.read_bytes(), str(note))
    except (OSError, DqtoolError):
        return None
    return (path, manifest) if Artifact(path, str(path), manifest).sha256 == entry["sha256"] else None


def _join_picture(result: Result, found: _Found) -> None:
    """The sample grid: the recorded one by its sha256, else one that is named like the result."""
    recorded = result.metrics.get("grid")
    if isinstance(recorded, dict) and "sha256" in recorded:
        near = [*_beside(result, recorded.get("file")), Path(str(result.manifest.parameters.get("grid")))]
        for path in [*near, *found.pictures]:
            if path.is_file() and sha256_file(path) == recorded["sha256"]:
                result.picture = path
                return
    namesake = next(iter(_beside(result, f"{result.path.stem}.png")), None)
    if namesake is not None and namesake.is_file():
        result.picture = namesake
        if recorded:
            result.picture_note = f"{namesake.name} lies beside the report; its bytes are not those that eval wrote."


def _beside(result: Result, name: object) -> list[Path]:
    """The path of a file beside the result; none for a name, or a link, that leads elsewhere: a page is passed on."""
    try:
        return [path_within(result.path.parent, name, str(result.path), links=result.path.parent)]
    except ArtifactError:
        return []


def _names(paths: Sequence[Path]) -> Iterator[str]:
    """A short name each: the file's own, or its directory's when it is `eval.json`; longer where two would be equal."""
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
    """Equal for results of one model sampled and judged in one way: what may be compared.

    The bias of a Fréchet distance depends on the number of images; their seed may differ.
    """
    model = result.manifest.model
    identity = {name: value for name, (value, _) in _conditions(result).items()}
    return canonical_json({"model": model.get("source_sha256") or model.get("source")} | identity)


def differences(result: Result, others: Sequence[Result]) -> list[str]:
    """What sets a result apart from `others` of its model that it must not be compared with, in words."""
    there = [_conditions(other) for other in others]
    own = _conditions(result).items()
    return [said for name, (value, said) in own if any(value != other[name][0] for other in there)]


def _conditions(result: Result) -> dict[str, tuple[Any, str]]:
    """All that figures depend on beside the networks and the seed: by name its value and how that is said."""
    given, metrics = result.manifest.parameters, result.metrics
    sampling = (result.manifest.pipeline or {}).get("sampling") or {}
    images, steps, eta = metrics.get("samples"), given.get("steps") or sampling.get("steps"), sampling.get("eta")
    scheduler, sampler = sampling.get("scheduler", {}).get("_class_name"), given.get("sampler")
    guidance = sampling.get("guidance") if given.get("guidance") is None else max(float(given["guidance"]), 1.0)
    prompts, side, corrected = given.get("prompts"), given.get("image_size"), bool(given.get("correct_noise"))
    digest = None if prompts is None else hashlib.sha256(canonical_json(prompts).encode()).hexdigest()
    statistics = given.get("files", {}).get("ref_stats", {})
    judged = statistics.get("sha256")
    reference = None if result.quantized_reference is None else result.manifest.inputs[1]["sha256"]
    return {
        "images": (images, "no images" if images is None else f"{images} images"),
        "sampler": ([scheduler, sampler], sampler or scheduler or "the pipeline's own sampler"),
        "steps": (steps, f"{steps or 'default'} steps"),
        "eta": (eta, f"eta {eta or 0:g}"),
        "guidance": (guidance, "the model's own guidance" if guidance is None else f"guidance {guidance:g}"),
        "prompts": (digest, _or("the model's own prompts", digest, f"{len(prompts or ())} prompts")),
        "image_size": (side, "whole images" if side is None else f"centres of {side} pixels"),
        "correct_noise": (corrected, f"with{'' if corrected else 'out'} PTQD's correction"),
        "ref_stats": (judged, _or("no reference statistics", judged, f"reference statistics {statistics.get('file')}")),
        "reference": (reference, _or(f"against {REFERENCE}", reference, f"against {result.quantized_reference}")),
    }


def _or(otherwise: str, digest: str | None, said: str) -> str:
    """`said` with the digest's beginning, by which equal names differ; without a digest `otherwise`."""
    return otherwise if digest is None else f"{said} ({digest[:12]}…)"

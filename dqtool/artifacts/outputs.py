"""Checks of outputs: a command never replaces its inputs, nor a file that dqtool did not write. Imports no torch."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from dqtool.artifacts.files import is_interrupted, os_fault, target_of
from dqtool.artifacts.reading import MANIFEST_BYTES, check_archive, open_regular, parse_json, read_file
from dqtool.artifacts.store import DIRECTORY_MANIFEST, manifest_path, read_manifest
from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError

__all__ = ["GENERATOR", "OutputKind", "check_outputs", "check_outside", "check_results", "check_writable"]

OutputKind = Literal["artifact", "directory", "report", "picture", "images", "page"]
"""A safetensors file with its manifest, a directory, a JSON report, a PNG, an npz file, an HTML or Markdown page."""

GENERATOR = "dqtool"
"""`Software` of the pictures that dqtool writes, `generator` of its pages: by these it knows them again."""

_NAMES: dict[str, str] = {
    "artifact": "A safetensors artifact",
    "report": "A report",
    "picture": "A picture",
    "images": "An npz file",
    "page": "A page",
}
_ELSEWHERE = "Choose a place outside it for the output"


def check_outputs(
    outputs: Sequence[tuple[str, OutputKind]], inputs: Iterable[str | os.PathLike[str]] = (), *, overwrite: bool = False
) -> None:
    """Raise what `check_writable` raises for any output (path, kind) of a command; `UsageError` if two are one file."""
    sources = list(inputs)
    seen: set[str] = set()
    for path, kind in outputs:
        check_writable(path, kind, inputs=sources, overwrite=overwrite)
        places = {os.path.realpath(place) for place in _written(target_of(path), kind)}
        if places & seen:
            raise UsageError("Two outputs of this command are one file", where=path, fix="Give each its own name")
        seen |= places


def check_writable(
    path: str | os.PathLike[str],
    kind: OutputKind = "artifact",
    *,
    inputs: Iterable[str | os.PathLike[str]] = (),
    overwrite: bool = False,
) -> None:
    """Raise, before any long work, when writing `path` would fail at its end or would destroy something.

    `inputs` are the files and directories that the command reads; those that do not exist are passed over. With
    `overwrite` a file that dqtool did not write may be replaced; a directory only if dqtool made it.

    Raises:
        UsageError: the output is, lies in or holds an input, by its path or as another name of the same file; or its
            name ends as that of another kind.
        EnvironmentFault: the parent directory is missing or not writable; a file is where a directory belongs or the
            reverse; `path` is a symbolic link or no ordinary file; something would be replaced that dqtool did not
            write, or wrote as something else.
    """
    target, given = target_of(path), os.fspath(path)
    if kind != "directory" and (target.suffix == ".json") != (kind == "report"):
        suffix = {"report": ".json", "artifact": ".safetensors", "picture": ".png", "images": ".npz"}.get(kind, ".html")
        raise UsageError(
            f"{_NAMES[kind]} can not have this name", where=given, fix=f"Give a name that ends in {suffix}"
        )
    try:
        _check_parent(target)
        for place in _written(target, kind):
            check_outside(place, inputs, given)
        if kind == "directory":
            _check_directory(target, given, overwrite=overwrite)
        else:
            _check_file(target, given, kind, overwrite=overwrite)
    except OSError as error:
        raise os_fault(error, path) from error


def check_results(
    report: str | os.PathLike[str],
    beside: Sequence[str | os.PathLike[str]] = (),
    inputs: Iterable[str | os.PathLike[str]] = (),
) -> None:
    """Raise what `check_writable` raises for a JSON report, and for the texts and figures of it beside it.

    A text or figure holds no mark of dqtool, so that it counts as dqtool's if its report exists.
    """
    check_writable(report, "report", inputs=inputs)
    sources = list(inputs)
    for path in beside:
        target = target_of(path)
        check_outside(target, sources, os.fspath(path))
        if target.exists() and (target.is_dir() or _json_kind(Path(report)) != "report"):
            raise EnvironmentFault(
                f"This file exists, and its report {Path(report).name} is not beside it, so it is not replaced",
                where=os.fspath(path),
                fix="Move it away, or choose another place",
            )


def check_outside(path: Path, inputs: Iterable[str | os.PathLike[str]], given: str) -> None:
    """Raise `UsageError` when the output `path` is an input, lies in one or holds one. `given` is its name in messages."""
    place = os.path.realpath(path)
    for source in _expanded(inputs):
        real = os.path.realpath(source)
        if real == place or _same_file(path, source):
            raise UsageError("The output would overwrite its own input", where=given, fix="Choose another name with -o")
        if os.path.isdir(real) and (_lies_in(place, real) or _is_linked_in(path, real)):
            raise UsageError(
                "The output lies in a directory that this command reads",
                where=f"{given} in {os.fspath(source)}",
                fix=_ELSEWHERE,
            )
        if _lies_in(real, place):
            raise UsageError(
                "The output would replace a directory that holds an input of this command",
                where=f"{os.fspath(source)} in {given}",
                fix=_ELSEWHERE,
            )


def _written(target: Path, kind: OutputKind) -> list[Path]:
    """Return the paths that an output takes."""
    return [target, manifest_path(target)] if kind == "artifact" and not target.is_dir() else [target]


def _expanded(inputs: Iterable[str | os.PathLike[str]]) -> Iterator[Path]:
    """Return the inputs that exist, each file with the manifest beside it."""
    for source in map(Path, inputs):
        if not os.path.lexists(source):
            continue
        yield source
        if source.suffix == ".safetensors" and os.path.lexists(manifest_path(source)):
            yield manifest_path(source)


def _lies_in(path: str, directory: str) -> bool:
    return path != directory and Path(path).is_relative_to(directory)


def _same_file(first: Path, second: Path) -> bool:
    return first.exists() and second.exists() and os.path.samefile(first, second)


def _is_linked_in(path: Path, directory: str) -> bool:
    """Return whether a file somewhere in `directory` is the file `path` under another name (a hard link)."""
    if not path.is_file() or path.stat().st_nlink < 2:
        return False
    own = path.stat()
    files = (os.path.join(root, name) for root, _, names in os.walk(directory) for name in names)
    return any(os.path.samestat(own, os.stat(file)) for file in files if os.path.isfile(file))


def _check_parent(target: Path) -> None:
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


def _check_directory(target: Path, given: str, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise EnvironmentFault(
            "This exists and is not a directory", where=given, fix="A directory is written here; choose another -o"
        )
    present = [entry for entry in target.rglob("*") if entry.is_symlink() or not entry.is_dir()]
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
        if name not in listed and name != DIRECTORY_MANIFEST and not overwrite:
            raise EnvironmentFault(
                f"This directory holds a file that dqtool did not write ({name}), so it is not replaced",
                where=given,
                fix="Move the file away, choose a new directory with -o, or give --overwrite to lose the file",
            )


def _check_file(target: Path, given: str, kind: OutputKind, *, overwrite: bool) -> None:
    if target.is_dir():
        raise EnvironmentFault(
            "This is a directory, and a file is to be written", where=given, fix="Name a file with -o"
        )
    note = manifest_path(target)
    if kind == "report" and _json_kind(target) == "artifact":
        raise EnvironmentFault(
            "This JSON is the manifest of an artifact and would be overwritten",
            where=given,
            fix="Name another file with -o",
        )
    if overwrite and not note.is_dir():
        return
    # A report is written under the name the user typed. A manifest's name is derived, and nobody expects a diffusers
    # config.json to vanish because the weights are called config.safetensors.
    if kind == "artifact" and _json_kind(note) in ("foreign", "report"):
        raise EnvironmentFault(
            "The manifest that belongs to this output would overwrite a file that is something else",
            where=str(note),
            fix="Name another file with -o, move that file away, or give --overwrite to replace it",
        )
    if target.exists() and not _OURS[kind](target):
        raise EnvironmentFault(
            f"This file exists, and it is no {_OWN[kind]} that dqtool wrote, so it is not replaced",
            where=given,
            fix="Name another file with -o, move this one away, or give --overwrite to replace it",
        )


def _json_kind(path: Path) -> str:
    """Return `absent`, `foreign` or `damaged`, or for a file of dqtool `artifact` (a manifest) or `report`."""
    if not os.path.lexists(path):
        return "absent"
    try:
        payload = parse_json(read_file(path, MANIFEST_BYTES))
    except ArtifactError:  # a directory, a device, or far too large for a manifest
        return "foreign"
    except ValueError:
        return "damaged"
    if not isinstance(payload, dict):
        return "foreign"
    if str(payload.get("format")).startswith("dqtool/"):
        return "artifact" if "file" in payload or "files" in payload else "report"
    own = str(payload.get("format")).startswith("dqtool-") or str(payload.get("command")).startswith("dqtool ")
    return "report" if own else "foreign"


def _is_artifact(path: Path) -> bool:
    """Return whether the file has a manifest, or its writer was killed between the two."""
    return _json_kind(manifest_path(path)) in ("artifact", "damaged") or is_interrupted(path)


def _is_report(path: Path) -> bool:
    return _json_kind(path) == "report" or (
        _json_kind(path) == "damaged" and b'"dqtool' in read_file(path, MANIFEST_BYTES)
    )


def _is_picture(path: Path) -> bool:
    """Return whether the file is a PNG whose `Software` is dqtool."""
    with open_regular(path) as stream:
        if stream.read(8) != b"\x89PNG\r\n\x1a\n":
            return False
        while len(head := stream.read(8)) == 8:
            size, name = struct.unpack(">I4s", head)
            if name == b"IDAT" or size > 1 << 16:
                return False
            data = stream.read(size + 4)
            if name == b"tEXt" and data.startswith(b"Software\0" + GENERATOR.encode()):
                return True
    return False


def _is_images(path: Path) -> bool:
    """Return whether the file is an npz file with dqtool's note in it."""
    try:
        with open_regular(path) as stream:
            return any(member.filename == "dqtool.npy" for member in check_archive(stream, packed=True))
    except ValueError:
        return False


def _is_page(path: Path) -> bool:
    with open_regular(path) as stream:
        text = stream.read(1 << 16)
    return b'name="generator" content="dqtool' in text or b"page made by dqtool " in text


_OURS: dict[str, Callable[[Path], bool]] = {
    "artifact": _is_artifact,
    "report": _is_report,
    "picture": _is_picture,
    "images": _is_images,
    "page": _is_page,
}
_OWN = {"artifact": "artifact", "report": "report", "picture": "picture", "images": "npz file", "page": "page"}

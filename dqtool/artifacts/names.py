"""Names that come out of files, made into paths: the one place where this is done. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dqtool.artifacts.cache import cache_directory
from dqtool.errors import ArtifactError, EnvironmentFault

__all__ = ["check_component", "check_name", "check_shards", "path_within"]

_LONGEST_PART = 255  # bytes; the limit of common file systems
_LONGEST = 1024
_COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}", re.ASCII)
_BLOB = re.compile(r"[0-9a-f]{40,64}")  # Git's SHA-1 or SHA-256, as the Hub cache names its files


def path_within(root: str | os.PathLike[str], name: object, where: str, *, links: Path | None = None) -> Path:
    """Return the path of the file that a file's content calls `name`, which lies inside the directory `root`.

    Nothing on the way from `root` may be a symbolic link, unless `links` names the directory of the model that is being
    read: links may then lead anywhere inside it, or to a blob of the Hugging Face cache that it lies in. `where` says
    in messages which file holds the name.

    Raises:
        ArtifactError: the name is no relative path, leaves `root`, or passes a link that it may not.
    """
    parts = check_name(name, where)
    path = Path(root).joinpath(*parts)
    steps = [Path(root).joinpath(*parts[: number + 1]) for number in range(len(parts))]
    try:
        if not any(step.is_symlink() for step in steps):
            inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        else:
            inside = links is not None and _may_lead_to(Path(os.path.realpath(path)), links)
    except (OSError, ValueError) as error:
        raise ArtifactError("This name can not be a path", where=f"{where}, {_shown(name)}") from error
    if not inside:
        raise ArtifactError(
            "A symbolic link leads out of the directory that this file belongs to",
            where=f"{path} ({where})",
            fix="Replace the link by a copy of the file, if you trust it; links may lead only into the model's own "
            "directory or to the blobs of the Hugging Face cache",
        )
    return path


def check_name(name: object, where: str) -> list[str]:
    """Return the parts of a relative path that a file's content gives with `/` between them.

    Raises:
        ArtifactError: the name is empty, absolute or too long, or holds `.`, `..`, a drive letter, a backslash or a control
            character.
    """
    problem = "it is no text"
    if isinstance(name, str):
        parts = name.split("/")
        problem = _problem(name, parts)
        if not problem:
            return parts
    raise ArtifactError(
        f"A name in this file can not be used as a path: {problem}",
        where=f"{where}, {_shown(name)}",
        fix="Get the file from a source that you trust",
    )


def check_component(name: object, where: str) -> str:
    """Return the name of a pipeline's component, which is one plain word (letters, digits, underscores).

    Raises:
        ArtifactError: it is anything else, such as an empty name, `..` or a path.
    """
    if isinstance(name, str) and _COMPONENT.fullmatch(name):
        return name
    raise ArtifactError(
        "A component of a pipeline has a name that is no plain word of letters, digits and underscores",
        where=f"{where}, {_shown(name)}",
        fix="Get the model from a source that you trust, or rename the component",
    )


def check_shards(index: object, where: str) -> list[str]:
    """Return the sorted names of the files that an index of sharded weights (`*.index.json`) lists.

    Raises:
        ArtifactError: there is no `weight_map`, or a name in it is no relative path.
    """
    names = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(names, Mapping) or not names:
        raise ArtifactError("This index of shards has no weight_map", where=where)
    for name in _unique(names.values()):
        check_name(name, f"{where}, weight_map")
    return sorted(set(names.values()))


def _unique(values: Iterable[Any]) -> list[Any]:
    return list({str(value): value for value in values}.values())


def _problem(name: str, parts: list[str]) -> str:
    if not name:
        return "it is empty"
    if any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp") for letter in name):
        return "it holds a control character"
    if "\\" in name:
        return "it holds a backslash"
    if name.startswith("/"):
        return "it is an absolute path"
    if any(re.match(r"[A-Za-z]:", part) for part in parts):
        return "it holds a drive letter"
    if any(part in ("", ".", "..") for part in parts):
        return "a part of it is empty, . or .."
    if len(name.encode()) > _LONGEST or max(len(part.encode()) for part in parts) > _LONGEST_PART:
        return "it is too long"
    return ""


def _may_lead_to(target: Path, model: Path) -> bool:
    """Return whether a link of the model in the directory `model` may lead to `target`, a path without links."""
    if target.is_relative_to(os.path.realpath(model)):
        return True
    with contextlib.suppress(EnvironmentFault):  # without a cache there are none
        # `dqtool.models.sources.original.shell` makes directories of links whose targets it had checked.
        if Path(os.path.realpath(model)).parent == Path(os.path.realpath(cache_directory("originals"))):
            return True
    blobs = _hub_blobs(model)
    return blobs is not None and target.parent == blobs and _BLOB.fullmatch(target.name) is not None


def _hub_blobs(model: Path) -> Path | None:
    """Return `models--ORG--NAME/blobs` of the Hub cache if `model` is, or lies in, `models--ORG--NAME/snapshots/REVISION`."""
    real = Path(os.path.realpath(model))
    for snapshot in (real, *real.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and repository.name.startswith("models--"):
            blobs = repository / "blobs"
            return None if blobs.is_symlink() else blobs
    return None


def _shown(name: object) -> str:
    """Return a name as a message can hold it: without control characters, and not too long."""
    text = ascii(name)
    return text if len(text) <= 80 else f"{text[:77]}..."

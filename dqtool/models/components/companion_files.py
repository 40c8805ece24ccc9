"""Companion files: the files of a pipeline's float components, all but the quantized network. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from dqtool.artifacts import sha256_file
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.names import check_component, path_within
from dqtool.artifacts.reading import json_object
from dqtool.artifacts.records import PipelineRecord
from dqtool.errors import ArtifactError
from dqtool.models.sources.reading import read_json
from dqtool.models.sources.weight_files import plain_weight_name

__all__ = [
    "CARD",
    "check_companion",
    "companion_digest",
    "companion_files",
    "components_of",
    "config_in_float32",
    "listed_digest",
]

CARD = "sampling.json"
"""Name of the card, a file next to `model_index.json` with sampling defaults: `{"guidance": 1.5, "prompts": [["a seven", 7]]}`."""

SAFETENSORS = ".safetensors"
_SHARD = re.compile(r"-\d+-of-\d+")

OTHER_WEIGHTS = (".bin", ".msgpack", ".h5", ".onnx", ".onnx_data", ".ckpt", ".pt", ".pth", ".xml")


def components_of(index: ForeignConfig, where: str) -> list[str]:
    """Return the names of a pipeline's components, in the order of its `model_index.json`.

    Raises:
        ArtifactError: a name is no plain word, such as `..` or a path.
    """
    return [check_component(name, where) for name, entry in index.items() if isinstance(entry, list)]


def companion_files(
    pipeline: Path, index: ForeignConfig, component: str, variant: str | None = None
) -> dict[str, Path]:
    """Return {relative name: path} of the card and of every file of the companions, the scheduler's excepted.

    Hidden files are left out. Where weights come in several forms, the safetensors of `variant` are chosen, else those
    without a variant, else those of the only variant. They get names without a variant, which every library loads.

    Raises:
        ArtifactError: a component's name is no plain word, or a symbolic link leads out of the model.
    """
    found: dict[str, Path] = {}
    where = str(pipeline / "model_index.json")
    for name in components_of(index, where):
        if name in (component, "scheduler"):
            continue
        files = [path for path in _inside(pipeline, name, where) if path.is_file()]
        tensors = {path for path in files if SAFETENSORS in path.name and path.name.endswith((SAFETENSORS, ".json"))}
        kept = _kept(tensors, variant)
        for path in files:
            if tensors and path.name.endswith((*OTHER_WEIGHTS, ".bin.index.json")):
                continue
            if path in tensors and path not in kept:
                continue
            found[kept.get(path, path).relative_to(pipeline).as_posix()] = path
    if found:
        card = path_within(pipeline, CARD, str(pipeline), links=pipeline)
        found |= {CARD: card} if card.is_file() else {}
    return found


def _kept(weights: set[Path], variant: str | None) -> dict[Path, Path]:
    """Return the path under which each weight file or index is kept; shards follow their index."""
    heads = {path: path.with_name(plain_weight_name(path.name)) for path in weights if not _SHARD.search(path.name)}
    kept: dict[Path, Path] = {}
    for path, plain in sorted(heads.items()):
        alike = [other for other in sorted(heads) if heads[other] == plain]
        asked = [other for other in alike if variant is not None and f".{variant}." in other.name]
        if path == (asked or [other for other in alike if other == plain] or alike)[0]:
            kept[path] = plain
    indexes = [path for path in kept if path.suffix == ".json"]
    named = {
        index.parent / str(shard) for index in indexes for shard in read_json(index).get("weight_map", {}).values()
    }
    return kept | {path: path for path in weights if path in named}


def _inside(pipeline: Path, component: str, where: str) -> list[Path]:
    """Return all files below a component's directory but hidden ones, sorted; `ArtifactError` for a link that leads out."""
    folder = path_within(pipeline, component, where, links=pipeline)
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(pipeline).as_posix()
        if not any(part.startswith(".") for part in name.split("/")):
            found.append(path_within(pipeline, name, where, links=pipeline))
    return found


def check_companion(name: str, pipeline: PipelineRecord | None, where: str) -> None:
    """Check that the relative path of an artifact's file is the card or lies in a companion's directory.

    Raises:
        ArtifactError: the path lies in the network's directory, or in none of the pipeline's components.
    """
    known = pipeline or PipelineRecord()
    components = components_of(known.model_index or {}, f"{where}, key pipeline.model_index")
    folder, _, rest = name.partition("/")
    if name != CARD and (not rest or folder not in components or folder in (known.component, "scheduler")):
        raise ArtifactError(
            "A file of this artifact belongs to none of its pipeline's other components",
            where=f"{where}, {name!a}",
            fix="Get the artifact from a source that you trust, or make it again",
        )


def companion_digest(pipeline: Path, index: ForeignConfig, component: str, variant: str | None = None) -> str:
    """Return a hex digest over the companion files; "" for a pipeline without any."""
    files = companion_files(pipeline, index, component, variant)
    if not files:
        return ""
    return listed_digest(files)


def listed_digest(files: Mapping[str, Path]) -> str:
    """Return a hex digest over the sorted names of files and the digests of their bytes."""
    lines = [f"{name} {sha256_file(path)}" for name, path in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def config_in_float32(content: bytes) -> bytes:
    """Return the bytes of a config.json with its weights' precision set to float32; unchanged where it names none."""
    config = json_object(content, "config.json")
    changed = {key: "float32" for key in ("dtype", "torch_dtype") if config.get(key, "float32") != "float32"}
    return json.dumps(config | changed, indent=2).encode() + b"\n" if changed else content

"""Weight files of a component directory, named as by diffusers and transformers. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from dqtool.artifacts.names import check_shards, path_within
from dqtool.errors import ArtifactError, UsageError
from dqtool.models.sources.reading import read_json

__all__ = ["find_weights", "plain_weight_name"]

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_WHOLE = re.compile(r"(?P<stem>\w+?)(\.(?P<variant>\w+))?\.(?P<format>safetensors|bin)")
_INDEX = re.compile(r"(?P<stem>\w+?)\.(?P<format>safetensors|bin)\.index(\.(?P<variant>\w+))?\.json")
"""Names of weights and indexes with a variant, `X.fp16.safetensors` and `X.safetensors.index.fp16.json`, as
`save_pretrained(variant="fp16")` writes them."""


def find_weights(path: Path, where: str, variant: str | None = None, model: Path | None = None) -> tuple[Path, ...]:
    """Return the files of a component's weights, preferring safetensors to pickles and one file to shards.

    `variant` is a word between name and ending (`fp16`, `bf16`, `ema`, `non_ema`). None selects the files without a variant,
    or the only variant.

    Symbolic links may lead anywhere inside the directory `model` of the whole model (None: `path`).

    Raises:
        ArtifactError: there are none, a link leads out of the model, or an index of shards is not what it should be.
        UsageError: the variant does not exist, or there are only variants, several, and `variant` is None.
    """
    found = _by_variant(path)
    if variant is not None:
        if variant not in found:
            there = ", ".join(name or "weights without a variant" for name in sorted(found, key=str)) or "no weights"
            raise UsageError(f"There is no variant '{variant}' in {path}", where="--variant", fix=f"There are {there}")
        return _files(found[variant], model or path)
    if None in found:
        return _files(found[None], model or path)
    if len(found) > 1:
        raise UsageError(
            f"These weights come in several variants only: {', '.join(sorted(map(str, found)))}",
            where=where,
            fix="Choose one with --variant NAME",
        )
    if not found:
        raise ArtifactError(
            "This directory holds no weights",
            where=f"{where}, {path}" if str(path) != where else where,
            fix=f"Expected {_STEMS[0]}.safetensors in it, with or without a variant, in one file or in shards",
        )
    return _files(next(iter(found.values())), model or path)


def plain_weight_name(name: str) -> str:
    """Return the name of a weight file, or of an index of shards, without its variant."""
    for pattern, plain in ((_WHOLE, "{stem}.{format}"), (_INDEX, "{stem}.{format}.index.json")):
        match = pattern.fullmatch(name)
        if match is not None and match["variant"] is not None:
            return plain.format(**match.groupdict())
    return name


def _by_variant(path: Path) -> dict[str | None, Path]:
    """Return the file or index to read for each variant in the directory."""
    found: dict[str | None, tuple[tuple[int, int, int], Path]] = {}
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        for sharded, pattern in enumerate((_WHOLE, _INDEX)):
            match = pattern.fullmatch(file.name)
            if match is None or match["stem"] not in _STEMS or not file.is_file():
                continue
            rank = (int(match["format"] == "bin"), sharded, _STEMS.index(match["stem"]))
            variant = match["variant"]
            if variant not in found or rank < found[variant][0]:
                found[variant] = (rank, file)
    return {variant: file for variant, (_, file) in found.items()}


def _files(file: Path, model: Path) -> tuple[Path, ...]:
    path_within(file.parent, file.name, str(file.parent), links=model)
    if not file.name.endswith(".json"):
        return (file,)
    names = check_shards(read_json(file), str(file))
    strange = next((name for name in names if Path(name).name != name), None)
    if strange is not None:
        raise ArtifactError(f"This index names a shard outside its directory: {strange!r}", where=str(file))
    missing = next((name for name in names if not (file.parent / name).is_file()), None)
    if missing is not None:
        raise ArtifactError(
            f"The shard {missing} is missing", where=str(file), fix="Download the whole model, or all of this variant"
        )
    return tuple(path_within(file.parent, name, str(file), links=model) for name in names)

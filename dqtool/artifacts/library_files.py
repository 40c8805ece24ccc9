"""Directories of models and tokenizers that transformers and diffusers read, checked before they see them.

These libraries trust what they open: a config may name code to run or download, a pickle may call functions, and a number
may ask for any amount of memory. Only ordinary files of known kinds and honest sizes pass. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dqtool.artifacts.names import check_shards, path_within
from dqtool.artifacts.reading import (
    CONFIG_BYTES,
    TEXT_BYTES,
    check_regular,
    json_object,
    open_regular,
    read_file,
    read_text_file,
)
from dqtool.artifacts.tensorfile import read_header
from dqtool.errors import ArtifactError

__all__ = ["check_library_directory", "check_library_file", "values_in_weights"]

LARGEST_NUMBER = 1 << 31
"""Largest number of a config; a tokenizer's `model_max_length` may be more, as transformers writes 10^30 for "none"."""
_SIZES = re.compile(
    r"(?:.*_)?(?:dim|size|layers|heads|channels|positions|embeddings|length|buckets|distance|d_ff|d_kv|d_model)"
)
_LARGEST_SIZE = 1 << 21
"""Largest size: the vocabularies of multilingual models have some 250,000 entries."""
_NONE_DIGITS = 31
"""Digits of 10^30."""
_UNBOUNDED = ("model_max_length", "max_length")
_CODE = {
    "auto_map": "names code of its own",
    "custom_pipelines": "names code of its own",
    "trust_remote_code": "asks to run code of its own",
    "quantization_config": "is quantized already",
}
"""Keys of a config that make a library import, download or run something."""
_ATTENTION = (None, "eager", "sdpa")
_TEXTS = (
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "vocab.json",
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
)
_LISTS = ("vocab.json", "tokenizer.json", "added_tokens.json")
_MOST_TOKENS = 3_000_000
_REPEATED_GROUP = re.compile(r"(?<!\\)\)[+*{]")
"""Repeated groups in a tokenizer's regular expression: its engine may try exponentially many ways to match them."""


def check_library_directory(root: Path, where: str) -> None:
    """Check all files of one component, such as a text encoder or a tokenizer, by name, kind, size and content.

    Files of other kinds stay, since the libraries do not open them: pictures, documents, weights in formats that are not
    asked for. Symbolic links may lead only into the directory or to the blobs of the Hub cache that it lies in.

    Raises:
        ArtifactError: a file is no ordinary one, too large, or asks for code, or a number in it is beyond any model.
    """
    for path in sorted(root.iterdir()):
        if path.is_dir() and not path.is_symlink():
            continue  # the libraries read no folders of a component
        check_library_file(path_within(root, path.name, where, links=root), where)


def check_library_file(path: Path, where: str) -> None:
    """Check one of them; raises as `check_library_directory`."""
    name = path.name
    if name.endswith((".py", ".pyc", ".so", ".dll")):
        raise ArtifactError("This directory holds code, and dqtool runs none of it", where=f"{where}, {name!a}")
    check_regular(path)
    if name.endswith(".safetensors"):
        read_header(path)
    elif name.endswith(".index.json"):
        check_shards(json_object(read_file(path, CONFIG_BYTES), str(path)), str(path))
    elif name in _TEXTS:
        _check_tokens(path)
    elif name.endswith((".json", ".jinja", ".txt", ".model")):
        content = read_file(path, CONFIG_BYTES)
        if name.endswith(".json"):
            _check_config(json_object(content, str(path), digits=_NONE_DIGITS), str(path), "")


def values_in_weights(root: Path) -> int:
    """Return the number of values in a component's safetensors files; raises as `read_header`."""
    total = 0
    for path in sorted(root.glob("*.safetensors")):
        for entry in read_header(path).values():
            values = 1
            for length in entry["shape"]:
                values *= length
            total += values
    return total


def _check_tokens(path: Path) -> None:
    """Check a tokenizer's table, which has more entries than other JSON may have, without parsing it where it is large."""
    if path.suffix != ".json":
        with open_regular(path, TEXT_BYTES):
            return
    text = read_text_file(path, TEXT_BYTES)
    marks = sum(map(text.count, (",", "[", "{")))
    if marks > _MOST_TOKENS:
        raise ArtifactError(
            f"This tokenizer lists {marks:,} values, and at most {_MOST_TOKENS:,} are read", where=str(path)
        )
    for pattern in re.findall(r'"Regex"\s*:\s*"((?:[^"\\]|\\.)*)"', text):
        if len(pattern) > 2_000 or _REPEATED_GROUP.search(pattern):
            raise ArtifactError(
                "A regular expression of this tokenizer may take for ever to match",
                where=str(path),
                fix="Get the tokenizer from a source that you trust",
            )


def _check_config(value: Any, where: str, key: str) -> None:
    if isinstance(value, Mapping):
        for inner, item in value.items():
            if inner in _CODE and item not in (None, False):
                raise ArtifactError(
                    f"This model {_CODE[inner]}, and dqtool does not load such models",
                    where=f"{where}, key {inner}",
                    fix="Give a model of transformers' own classes, in full precision",
                )
            if inner.endswith("attn_implementation") and (not isinstance(item, str | None) or item not in _ATTENTION):
                raise ArtifactError(
                    "This model asks for an attention that its libraries would download", where=f"{where}, key {inner}"
                )
            _check_config(item, where, str(inner))
    elif isinstance(value, list):
        for item in value:
            _check_config(item, where, key)
    elif isinstance(value, int) and not isinstance(value, bool) and key not in _UNBOUNDED:
        most = _LARGEST_SIZE if _SIZES.fullmatch(key) else LARGEST_NUMBER
        if not -LARGEST_NUMBER <= value <= most:
            raise ArtifactError(f"{key} is {value}, and at most {most:,} is read", where=where)

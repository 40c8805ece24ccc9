"""Tokenizers for single files, which hold none: read from a given directory or the local Hub cache. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.models.sources.hub_cache import cached_file
from dqtool.models.sources.library_models import load_library_tokenizer

if TYPE_CHECKING:
    from dqtool.models.sources.original.text_encoders import TextEncoder

__all__ = ["find_tokenizers", "load_tokenizer"]

_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_CACHED = {
    "clip": (
        ("openai/clip-vit-large-patch14", ""),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer"),
        ("CompVis/stable-diffusion-v1-4", "tokenizer"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "tokenizer"),
    ),
    "t5": (("google/t5-v1_1-xxl", ""), ("stabilityai/stable-diffusion-3-medium-diffusers", "tokenizer_3")),
}
"""Hub models, and folders in them, with the tokenizers that single files use, by kind of text encoder."""


def find_tokenizers(
    texts: Sequence[TextEncoder], tokenizer: str | None, pipeline: str | None
) -> dict[str, Path] | None:
    """Return {component: directory} of the tokenizers; None where one is not found.

    `tokenizer` is a tokenizer's directory, or one with a folder for each; `pipeline` is a pipeline directory.

    Raises:
        EnvironmentFault: a given directory does not exist.
        ArtifactError: a given directory holds no tokenizer.
    """
    found: dict[str, Path] = {}
    for text in texts:
        place = _named(text, tokenizer, pipeline) or _cached(text)
        if place is None:
            return None
        found[text.tokenizer] = place
    return found


def load_tokenizer(text: TextEncoder, place: Path) -> Any:
    """Return the tokenizer at `place` with the padding token of this encoder's pipeline.

    Raises:
        ArtifactError: transformers can't read it.
        EnvironmentFault: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as e:
        raise EnvironmentFault("Tokenizers need the package transformers", fix='pip install "dqtool[text]"') from e
    cls: Any = getattr(transformers, "T5TokenizerFast" if text.kind == "t5" else "CLIPTokenizer")
    tokenizer = load_library_tokenizer(cls, place, str(place))
    if text.pads is not None and text.pads in tokenizer.get_vocab():
        tokenizer.pad_token = text.pads
    return tokenizer


def _named(text: TextEncoder, tokenizer: str | None, pipeline: str | None) -> Path | None:
    for option, given in (("--tokenizer", tokenizer), ("--pipeline", pipeline)):
        if given is None:
            continue
        root = Path(given)
        if not root.is_dir():
            raise EnvironmentFault("There is no such directory", where=f"{option} {given}")
        folders = [root / text.tokenizer]
        if text.kind != "t5":
            folders += [root / "tokenizer", *([root] if option == "--tokenizer" else [])]
        elif option == "--tokenizer" and (root / "spiece.model").is_file():
            folders.append(root)
        place = next((folder for folder in folders if any((folder / name).is_file() for name in _FILES)), None)
        if place is not None:
            return place
        if option == "--tokenizer" and text.kind != "t5":
            raise ArtifactError(
                "This directory holds no tokenizer",
                where=f"--tokenizer {given}",
                fix="Give the directory with tokenizer.json, or vocab.json and merges.txt",
            )
    return None


def _cached(text: TextEncoder) -> Path | None:
    for model, folder in _CACHED["t5" if text.kind == "t5" else "clip"]:
        for name in _FILES:
            path = cached_file(model, f"{folder}/{name}".lstrip("/"))
            if path is not None:
                return path.parent
    return None

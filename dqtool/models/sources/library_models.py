"""Models and tokenizers of transformers and diffusers, loaded from directories of which nothing is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dqtool.artifacts.library_files import check_library_directory, values_in_weights
from dqtool.artifacts.reading import load_json
from dqtool.errors import ArtifactError, DqtoolError
from dqtool.models.config_schema import bounded_parameters

__all__ = [
    "check_model_directory",
    "check_token_numbers",
    "library_faults",
    "load_library_tokenizer",
    "without_pickles",
]

SLACK = 1 << 24
"""Values beyond twice those of its files that a config may describe: buffers and tied weights."""


@contextmanager
def library_faults(what: str, where: str, fix: str | None = None) -> Iterator[None]:
    """Say whatever a library raises of a damaged file as `ArtifactError`.

    tokenizers, which is written in Rust, panics by an exception that is no `Exception`.
    """
    try:
        yield
    except (DqtoolError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        text = " ".join(str(error).split())[:200]
        raise ArtifactError(f"{what} can't be loaded: {text}", where=where, fix=fix) from error


def check_model_directory(cls: Any, root: Path, where: str) -> None:
    """Check the files of a component of class `cls`, and its config against its weights, before anything is allocated.

    Raises:
        ArtifactError: as `check_library_directory`; or there are no safetensors weights, or far fewer values than the
            config describes.
    """
    import torch

    check_library_directory(root, where)
    found = values_in_weights(root)
    if not found:
        raise ArtifactError(
            "This directory holds no safetensors weights, and dqtool runs no pickles of other libraries",
            where=where,
            fix="Download the model's model.safetensors, or convert it with transformers' save_pretrained",
        )
    config = load_json(root / "config.json")
    with library_faults("The config", f"{where}, config.json"), torch.device("meta"), bounded_parameters():
        if hasattr(cls, "config_class") and cls.config_class is not None:
            network = cls(cls.config_class.from_dict(config))
        else:
            network = cls.from_config(config)
    described = sum(parameter.numel() for parameter in network.parameters())
    if described > 2 * found + SLACK:
        raise ArtifactError(
            f"The config describes a model of {described:,} values, and its weights hold {found:,}",
            where=f"{where}, config.json",
            fix="Check that config and weights belong together",
        )


def check_token_numbers(tokens: Any, vocabulary: int, where: str) -> None:
    """Raise `ArtifactError` where a tokenizer gives numbers (a tensor, or a list) that its text encoder has no row for."""
    highest = max((int(number) for number in tokens), default=0) if isinstance(tokens, list) else int(tokens.max())
    if highest >= vocabulary:
        raise ArtifactError(
            f"The tokenizer gives the token number {highest:,}, and the text encoder knows {vocabulary:,}",
            where=where,
            fix="Check that tokenizer and text encoder belong together",
        )


def without_pickles(root: Path) -> None:
    """Replace the pickled weights of a component, which dqtool reads without running them, by a safetensors file.

    Raises:
        ArtifactError: a pickle is damaged, too large, or would run code.
    """
    pickles = sorted(root.glob("*.bin"))
    if not pickles or any(root.glob("*.safetensors")):
        return
    from dqtool.artifacts.tensorfile import save_tensors
    from dqtool.models.sources.original.checkpoint import read_checkpoint

    state: dict[str, Any] = {}
    for path in pickles:
        state |= read_checkpoint(path)
    stem = "diffusion_pytorch_model" if pickles[0].name.startswith("diffusion") else "model"
    save_tensors(root / f"{stem}.safetensors", state)
    for path in (*pickles, *root.glob("*.bin.index.json")):
        path.unlink()


def load_library_tokenizer(cls: Any, root: Path, where: str, fix: str | None = None) -> Any:
    """Return the tokenizer of class `cls` in a directory, after `check_library_directory`.

    Raises:
        ArtifactError: a file is refused, or transformers can't read it.
    """
    check_library_directory(root, where)
    with library_faults("The tokenizer", where, fix):
        return cls.from_pretrained(root, local_files_only=True)

"""Files of an example: tensors, and beside them the JSON file with what is no tensor. Imports no torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["example_files"]


def example_files(path: str) -> list[Path]:
    """Return the files of `--example PATH`, tensors first; `path` may name either of the two.

    A file that is not there is left out, unless none is: then the error of opening `path` is the caller's.
    """
    given = Path(path)
    both = (
        [given.with_suffix(".safetensors"), given] if given.suffix == ".json" else [given, given.with_suffix(".json")]
    )
    return [each for each in both if each.exists()] or [given]

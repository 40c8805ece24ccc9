"""Prompts from the files they come in: one a line, DrawBench's and PartiPrompts' tables, COCO's captions."""

from __future__ import annotations

import csv
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dqtool.artifacts.reading import TEXT_BYTES, parse_json, read_text_file
from dqtool.errors import ArtifactError

__all__ = ["COLUMNS", "read_prompts"]

COLUMNS = ("prompt", "prompts", "caption", "captions", "text")
"""Heads of the column that holds the prompts, in any case."""

_ANNOTATIONS = 4_000_000
"""Most values of a JSON of prompts; COCO's largest file of captions has two million."""


def read_prompts(path: str | os.PathLike[str], count: int | None = None, seed: int = 0) -> list[str]:
    """The prompts of a file in its order, at most `count`.

    `.csv` and `.tsv`: the column headed as in `COLUMNS` (DrawBench: "Prompts"), else the only column. `.json`: a list of
    texts, or COCO's annotations, of which every image gives its first caption, `count` images drawn by `seed`.
    Anything else: one prompt a line, empty lines left out.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: it holds no prompts, is not text, or is a table whose quotes do not match.
    """
    given = os.fspath(path)
    suffix = Path(path).suffix.lower()
    text = read_text_file(path, TEXT_BYTES)
    if suffix in (".csv", ".tsv"):
        prompts = _table(text, given, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        prompts = _json(text, given, count, seed)
    else:
        prompts = text.split("\n")  # str.splitlines knows more ends of lines, which prompts may hold
    prompts = [stripped for prompt in prompts if (stripped := prompt.strip())]
    if not prompts:
        raise ArtifactError("This file holds no prompts", where=given, fix="Write one prompt a line")
    return prompts[:count]


def _table(text: str, given: str, delimiter: str) -> list[str]:
    rows = [row for row in _rows(text, given, delimiter) if any(row)]
    if not rows:
        return []
    heads = [head.strip().lower() for head in rows[0]]
    column = next((heads.index(name) for name in COLUMNS if name in heads), None)
    if column is not None:
        return [row[column] for row in rows[1:] if len(row) > column]
    if len(heads) == 1:
        return [row[0] for row in rows]
    raise ArtifactError(
        f"No column of this table is headed {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}",
        where=f"{given}:1",
        fix="Head the column of prompts so, or write one prompt a line into a .txt file",
    )


def _rows(text: str, given: str, delimiter: str) -> Iterator[list[str]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ArtifactError(
                f"The row of this table that begins here can't be read: {error}",
                where=f"{given}:{line}",
                fix="Close the quotes of every field that begins with them, and double those inside it",
            ) from error
        yield row


def _json(text: str, given: str, count: int | None, seed: int) -> list[str]:
    try:
        content: Any = parse_json(text, values=_ANNOTATIONS)
        if isinstance(content, list) and all(isinstance(item, str) for item in content):
            return content
        first: dict[int, str] = {}
        for annotation in sorted(content["annotations"], key=lambda item: item["id"]):
            first.setdefault(int(annotation["image_id"]), " ".join(str(annotation["caption"]).split()))
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ArtifactError(
            "This JSON is neither a list of prompts nor COCO's captions (annotations with id, image_id, caption)",
            where=given,
        ) from error
    images = sorted(first)
    if count is not None and count < len(images):
        images = sorted(random.Random(seed).sample(images, count))
    return [first[image] for image in images]

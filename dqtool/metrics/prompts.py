"""Prompts from text files with one prompt a line, tables (DrawBench, PartiPrompts) and COCO's captions."""

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
"""Accepted headings of the column with the prompts, in any case."""

MOST_PROMPTS = 1_000_000
"""Most lines of a file of prompts; COCO has 414,113 captions."""
_ANNOTATIONS = 4_000_000
"""Most values of a JSON file of prompts; COCO's largest caption file has two million."""


def read_prompts(path: str | os.PathLike[str], count: int | None = None, seed: int = 0) -> list[str]:
    """Return the prompts of a file in its order, at most `count`.

    `.csv` and `.tsv` files: the column with a heading in `COLUMNS`, or the only column. `.json` files: a list of texts,
    or COCO's annotations, which give the first caption of each image; `seed` draws `count` of the images. Other files:
    one prompt a line; empty lines are skipped.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: the file holds no prompts, is not text, or is a table with unmatched quotes.
    """
    given = os.fspath(path)
    suffix = Path(path).suffix.lower()
    text = read_text_file(path, TEXT_BYTES)
    if text.count("\n") > MOST_PROMPTS:
        raise ArtifactError(
            f"This file has over {MOST_PROMPTS:,} lines, and at most so many prompts are read", where=given
        )
    if suffix in (".csv", ".tsv"):
        prompts = _table(text, given, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".json":
        prompts = _json(text, given, count, seed)
    else:
        prompts = text.split("\n")  # str.splitlines also splits at other characters, which prompts may hold
    prompts = [stripped for prompt in prompts if (stripped := prompt.strip())]
    if not prompts:
        raise ArtifactError("This file holds no prompts", where=given, fix="Write one prompt a line")
    return prompts[:count]


def _table(text: str, given: str, delimiter: str) -> list[str]:
    """Return the prompts of a CSV or TSV table."""
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
        f"No column of this table has the heading {', '.join(COLUMNS[:-1])} or {COLUMNS[-1]}",
        where=f"{given}:1",
        fix="Give the column of prompts one of these headings, or write one prompt a line into a .txt file",
    )


def _rows(text: str, given: str, delimiter: str) -> Iterator[list[str]]:
    """Yield the rows of a table; raise `ArtifactError` with the line of a row that can't be parsed."""
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ArtifactError(
                f"The row that starts at this line can't be read: {error}",
                where=f"{given}:{line}",
                fix="Close every quoted field, and double the quotes inside it",
            ) from error
        yield row


def _json(text: str, given: str, count: int | None, seed: int) -> list[str]:
    """Return the prompts of a JSON list or of COCO's captions."""
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

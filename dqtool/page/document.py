"""What a page is, apart from how it is written: sections of paragraphs, tables, charts and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Block", "Cell", "Charts", "Note", "Page", "Paragraph", "Picture", "Pictures", "Section", "Table"]


@dataclass(frozen=True)
class Cell:
    """Text of a table's cell; `best` marks the column's best value, `detail` is what stands small beside it."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Note:
    """Plain text that says what is missing and why, or warns of a figure."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table: `columns` with the direction that is better in brackets, rows of cells; the first `heads` of a row name it.

    With `folded` only the caption is shown until the reader opens it.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    heads: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Charts:
    """SVG images (heading, image, what to read in it) that stand side by side where there is room."""

    charts: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Picture:
    """A PNG as a data URI, with its caption."""

    caption: str
    uri: str


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side."""

    pictures: Sequence[Picture]


Block = Paragraph | Note | Table | Charts | Pictures


@dataclass
class Section:
    """A heading and what is under it; `level` 2 is a model, 3 a part of it."""

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 3


@dataclass
class Page:
    """The whole page."""

    title: str
    lead: str
    sections: list[Section]

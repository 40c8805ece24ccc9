"""Content of a page, independent of HTML and Markdown: sections of paragraphs, tables, charts and pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

__all__ = [
    "Block",
    "Cell",
    "Charts",
    "Note",
    "Omission",
    "Page",
    "Paragraph",
    "Picture",
    "Pictures",
    "Section",
    "Table",
    "gather_omissions",
    "without_controls",
]


_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def without_controls(text: str) -> str:
    """Return a rendered page with a replacement character for each control character: its texts come from files, and a
    terminal that shows it would obey them."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


@dataclass(frozen=True)
class Cell:
    """Cell of a table. `best` marks the best value of the column; `detail` is written small after the text."""

    text: str
    detail: str = ""
    best: bool = False


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Note:
    """Plain text that warns of a figure."""

    text: str


@dataclass(frozen=True)
class Omission:
    """Plain text that says what a section lacks, why, and how to get it. The page lists omissions folded at its end."""

    text: str


@dataclass(frozen=True)
class Table:
    """A table of cells.

    Attributes:
        caption: title of the table.
        columns: headings; an arrow at the end shows which direction is better.
        rows: cells of each row.
        heads: number of cells at the start of a row that name it.
        folded: only the caption is shown until the reader opens the table.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    heads: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Charts:
    """SVG images (heading, image, caption), shown side by side if there is space."""

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


Block = Paragraph | Note | Omission | Table | Charts | Pictures


@dataclass
class Section:
    """A heading with its blocks.

    Level 2 is a model or a comparison, level 3 a part of it. `chapter` is the heading of the table of contents under which
    a section of level 2 is listed.
    """

    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 3
    chapter: str = ""


@dataclass
class Page:
    """The whole page."""

    title: str
    lead: str
    sections: list[Section]


def gather_omissions(sections: Sequence[Section]) -> list[Section]:
    """Move the omissions of all sections into one folded table in a last section. Parts without other blocks are dropped."""
    kept: list[Section] = []
    rows: list[list[Cell]] = []
    chapter = ""
    for section in sections:
        chapter = section.title if section.level == 2 else chapter
        part = "" if section.level == 2 else section.title
        rows += [[Cell(chapter), Cell(part), Cell(b.text)] for b in section.blocks if isinstance(b, Omission)]
        blocks: list[Block] = [block for block in section.blocks if not isinstance(block, Omission)]
        if blocks or section.level == 2:
            kept.append(replace(section, blocks=blocks))
    if rows:
        table = Table(
            f"Left out of this page: {len(rows)} things, and what would give them", ("of", "part", "why"), rows, 2, True
        )
        kept.append(Section("Left out", [table], 2, "About"))
    return kept

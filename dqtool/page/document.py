"""What a page is, apart from how it is written: sections of paragraphs, tables, charts and pictures."""

from __future__ import annotations

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
]


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
    """Plain text that warns of a figure."""

    text: str


@dataclass(frozen=True)
class Omission:
    """Plain text that says what a section lacks, why, and what would give it. The page lists them once, folded, at its end."""

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


Block = Paragraph | Note | Omission | Table | Charts | Pictures


@dataclass
class Section:
    """A heading and what is under it; `level` 2 is a model or a comparison, 3 a part of it. `chapter` names the part of the
    table of contents that lists a section of level 2."""

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
    """Move what sections say they lack into one folded table in a last section. Parts with nothing else are dropped."""
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

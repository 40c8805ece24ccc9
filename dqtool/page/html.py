"""Renders a page as one HTML file without scripts, fonts or requests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from dqtool.artifacts.outputs import GENERATOR
from dqtool.page.document import Block, Cell, Charts, Note, Page, Paragraph, Pictures, Section, Table, without_controls
from dqtool.page.style import STYLE

__all__ = ["render_html"]

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: an attempt to load anything is an error in the browser's console."""


def render_html(page: Page) -> str:
    """Return the page as HTML. Equal pages give equal text."""
    nav = _contents(page)
    body = "".join(_section(section, page) for section in page.sections)
    return without_controls(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f'<meta name="generator" content="{GENERATOR}">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f'<header><h1>{escape(page.title)}</h1><p class="lead">{escape(page.lead)}</p></header>\n'
        f"{nav}{body}</main>\n</body>\n</html>\n"
    )


def _contents(page: Page) -> str:
    """Return the table of contents: a list of sections for each chapter. Short pages have none."""
    chapters: dict[str, list[Section]] = {}
    for section in page.sections:
        if section.level == 2:
            chapters.setdefault(section.chapter, []).append(section)
    if sum(map(len, chapters.values())) <= 3:
        return ""
    parts = []
    for chapter, sections in chapters.items():
        entries = "".join(f'<li><a href="#{_anchor(s, page)}">{escape(s.title)}</a></li>' for s in sections)
        heading = f"<h2>{escape(chapter)}</h2>" if chapter else ""
        parts.append(f"<div>{heading}<ol>{entries}</ol></div>")
    return f'<nav aria-label="Contents">{"".join(parts)}</nav>'


def _section(section: Section, page: Page) -> str:
    heading = f'<h{section.level} id="{_anchor(section, page)}">{escape(section.title)}</h{section.level}>\n'
    return f"<section>\n{heading}{''.join(_block(block) for block in section.blocks)}</section>\n"


def _anchor(section: Section, page: Page) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-")
    return f"{words}-{next(i for i, each in enumerate(page.sections) if each is section)}"


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>\n"
    if isinstance(block, Note):
        return f'<p class="note">{escape(block.text)}</p>\n'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Charts):
        return f'<div class="charts">{"".join(_chart(*chart) for chart in block.charts)}</div>\n'
    assert isinstance(block, Pictures), "omissions are gathered before a page is written"
    figures = "".join(
        f'<figure><img src="{picture.uri}" alt="{escape(picture.caption)}"><figcaption>{escape(picture.caption)}'
        "</figcaption></figure>"
        for picture in block.pictures
    )
    return f'<div class="pictures">{figures}</div>\n'


def _chart(heading: str, svg: str, caption: str) -> str:
    below = f"<span>{escape(caption)}</span>" if caption else ""
    return f"<figure><figcaption><b>{escape(heading)}</b>{below}</figcaption>{svg}</figure>"


def _table(table: Table) -> str:
    right = [
        index >= table.heads and bool(table.rows) and all(_is_figure(row[index].text) for row in table.rows)
        for index in range(len(table.columns))
    ]
    head = "".join(
        f'<th scope="col"{_css(right[i])}>{_with_direction(column)}</th>' for i, column in enumerate(table.columns)
    )
    rows = "".join(f"<tr>{_row(row, table.heads, right)}</tr>" for row in table.rows)
    # The visible caption is outside the box, so that it does not scroll with the table.
    above = "" if table.folded else f'<p class="caption" aria-hidden="true">{escape(table.caption)}</p>\n'
    caption = f'<caption class="hidden">{escape(table.caption)}</caption>'
    drawn = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    # A wide table scrolls in its own box; `tabindex` lets the keyboard reach it.
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">{drawn}</div>\n'
    return f"<details><summary>{escape(table.caption)}</summary>{box}</details>\n" if table.folded else above + box


def _row(row: Sequence[Cell], heads: int, right: Sequence[bool]) -> str:
    cells = []
    for index, cell in enumerate(row):
        text = f"<strong>{escape(cell.text)}</strong>" if cell.best else escape(cell.text)
        detail = f" <small>{escape(cell.detail)}</small>" if cell.detail else ""
        tag, scope = ("th", ' scope="row"') if index < heads else ("td", "")
        cells.append(f"<{tag}{scope}{_css(right[index])}>{text}{detail}</{tag}>")
    return "".join(cells)


def _with_direction(column: str) -> str:
    """Return a heading like `fd.digits ↓`, with the arrow in words for screen readers."""
    for arrow, words in (("↓", "lower is better"), ("↑", "higher is better")):
        if column.endswith(arrow):
            return (
                f"{escape(column[:-1].rstrip())}&nbsp;"
                f'<abbr title="{words}" aria-label="{words}" class="arrow">{arrow}</abbr>'
            )
    return escape(column)


def _css(right: bool) -> str:
    return ' class="n"' if right else ""


def _is_figure(text: str) -> bool:
    return text in ("", "–") or bool(re.match(r"[-+−]?[\d.]", text))

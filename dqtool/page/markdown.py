"""Renders a page as one Markdown file, with charts and pictures as data URIs, which most viewers show."""

from __future__ import annotations

import base64
from html import escape

from dqtool.page.document import Block, Cell, Charts, Note, Page, Paragraph, Pictures, Table, without_controls
from dqtool.page.style import CHART_STYLE

__all__ = ["render_markdown"]


def render_markdown(page: Page) -> str:
    """Return the page as Markdown. Equal pages give equal text."""
    lines = [f"# {_plain(page.title)}", "", _plain(page.lead)]
    for section in page.sections:
        lines += ["", f"{'#' * section.level} {_plain(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)]
    return without_controls("\n".join(lines) + "\n")


def _block(block: Block) -> list[str]:
    if isinstance(block, Paragraph):
        return [_plain(block.text)]
    if isinstance(block, Note):
        return [f"> {_plain(block.text)}"]
    if isinstance(block, Table):
        rule = ["---"] * len(block.columns)
        rows = [[_plain(column) for column in block.columns], rule, *[[_cell(c) for c in row] for row in block.rows]]
        drawn = [f"| {' | '.join(row)} |" for row in rows]
        if block.folded:
            return [f"<details><summary>{escape(block.caption)}</summary>", "", *drawn, "", "</details>"]
        return [f"*{_plain(block.caption)}*", "", *drawn]
    if isinstance(block, Charts):
        pairs = [(heading, _data_uri(svg), caption) for heading, svg, caption in block.charts]
    else:
        assert isinstance(block, Pictures), "omissions are gathered before a page is written"
        pairs = [(picture.caption, picture.uri, "") for picture in block.pictures]
    lines: list[str] = []
    for heading, uri, caption in pairs:
        text = f"**{_plain(heading)}**" + (f" {_plain(caption)}" if caption else "")
        lines += [*([""] if lines else []), text, "", f"![{_plain(heading)}]({uri})"]
    return lines


def _cell(cell: Cell) -> str:
    text = f"**{_plain(cell.text)}**" if cell.best else _plain(cell.text)
    return f"{text} ({_plain(cell.detail)})" if cell.detail else text


def _data_uri(svg: str) -> str:
    """Return the chart as a data URI that includes its style sheet."""
    styled = without_controls(svg).replace(">", f"><style>{CHART_STYLE}</style>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(styled.encode()).decode("ascii")


def _plain(text: str) -> str:
    """Escape the characters that mean something in Markdown, such as underscores and bars in names."""
    for character in "\\`*_|<>[]":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())

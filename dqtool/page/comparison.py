"""Section of the page for a table of comparisons, which `python -m dqtool.tables` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dqtool.page.charts import Line, lines
from dqtool.page.document import Cell, Charts, Note, Paragraph, Section, Table

__all__ = ["FORMAT", "comparison_section", "curve_chart", "figure_text", "is_best"]

FORMAT = "dqtool-table/1"
REFERENCE = "full precision"
ARROWS = {-1: " ↓", 0: "", 1: " ↑"}


def comparison_section(summary: Mapping[str, Any]) -> Section:
    """Return the section: the table with the paper's numbers, its curves, and the command that made it."""
    source = f" ({summary['source']})" if summary["source"] else ""
    variant = f", {summary['variant']}" if summary.get("variant") else ""
    section = Section(
        summary["title"] + source + variant,
        [Paragraph(f"{summary['runs_on'].capitalize()}. {summary['said']}")],
        2,
        "Comparisons",
    )
    if summary["about"]:
        section.blocks.append(Paragraph(summary["about"]))
    grouped = any(row["group"] for row in summary["rows"])
    columns = [*(["group"] if grouped else []), "row"]
    columns += [column["label"] + ARROWS[column["better"]] for column in summary["columns"]]
    columns += [f"paper: {summary['paper_columns']}"] if summary["paper_columns"] else []
    rows = [_row(summary, row, grouped) for row in summary["rows"]]
    caption = (
        "Means over seeds, with the sample standard deviation if there are several. The best of each group is marked"
    )
    section.blocks.append(Table(caption, columns, rows, heads=2 if grouped else 1))
    chart = curve_chart(summary)
    if chart is not None:
        section.blocks.append(Charts([("Training loss", chart, "Means over seeds.")]))
    cells = summary["cells"]
    if cells["finished"] < cells["all"] or cells["problems"]:
        text = f"Incomplete: {cells['finished']} of {cells['all']} cells are finished."
        section.blocks.append(Note(" ".join([text, *cells["problems"]])))
    section.blocks.append(Paragraph(f"Made by {summary['command']} with {'; '.join(summary['versions'])}."))
    return section


def curve_chart(summary: Mapping[str, Any]) -> str | None:
    """Plot the training curve of every row, mean over seeds. Return None if no row has one."""
    series: list[Line] = []
    for row in summary["rows"]:
        curves = row["curves"]
        if curves:
            length = min(len(curve) for curve in curves)
            mean = [sum(curve[i] for curve in curves) / len(curves) for i in range(length)]
            name = " ".join(filter(None, (row["group"], row["name"])))
            series.append(Line(name, [100 * (i + 1) / length for i in range(length)], mean, len(series)))
    if not series:
        return None
    return lines(summary["title"], "share of the iterations, %", "training loss", series)


def figure_text(value: Mapping[str, Any] | None, decimals: int) -> str:
    """Return `mean ± deviation`, without the deviation if there is none."""
    if value is None:
        return "–"
    text = f"{value['mean']:.{decimals}f}"
    return text if value["deviation"] is None else f"{text} ± {value['deviation']:.{decimals}f}"


def is_best(summary: Mapping[str, Any], row: Mapping[str, Any], column: Mapping[str, Any]) -> bool:
    """Return True if a row has the best value of its group, full precision left out."""
    if not column["better"] or row["name"] == REFERENCE or column["key"] not in row["values"]:
        return False
    rivals = [
        other["values"][column["key"]]["mean"] * column["better"]
        for other in summary["rows"]
        if other["group"] == row["group"] and other["name"] != REFERENCE and column["key"] in other["values"]
    ]
    return len(rivals) > 1 and row["values"][column["key"]]["mean"] * column["better"] == max(rivals)


def _row(summary: Mapping[str, Any], row: Mapping[str, Any], grouped: bool) -> Sequence[Cell]:
    cells = [Cell(row["group"])] if grouped else []
    cells.append(Cell(row["name"]))
    for column in summary["columns"]:
        value = row["values"].get(column["key"])
        text = "failed" if value is None and row["failed"] else figure_text(value, column.get("decimals", 2))
        cells.append(Cell(text, best=is_best(summary, row, column)))
    return [*cells, Cell(row["paper"] or "–")] if summary["paper_columns"] else cells

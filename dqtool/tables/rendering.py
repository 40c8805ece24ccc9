"""Results of a table as JSON, Markdown and SVG: means over seeds with deviations, and the paper's numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dqtool.artifacts import dqtool_version
from dqtool.metrics import CLASSIFIERS
from dqtool.page.comparison import ARROWS, FORMAT, REFERENCE, curve_chart, figure_text, is_best
from dqtool.page.style import CHART_STYLE
from dqtool.tables.cells import CellRecord, CellStore
from dqtool.tables.columns import COLUMNS, Column
from dqtool.tables.planning import Cell, Target
from dqtool.tables.provenance import iterations, provenance
from dqtool.tables.schedules import SCHEDULES
from dqtool.tables.spec import CORRECTED, Group, Row, Table

__all__ = ["curve_figure", "render_markdown", "summarise", "table_name"]

FLOORS = tuple(f"fd.{name}_from_reference" for name in CLASSIFIERS)
"""Columns whose floor is the distance of two sets of full-precision images."""


def summarise(
    table: Table, target: Target, cells: Sequence[Cell], store: CellStore, command: str, variant: str = ""
) -> dict[str, Any]:
    """Return the results of a table as JSON values. Rows without finished cells have no values.

    `variant` is the suffix of the table's name (`naming.variant_of`).
    """
    columns = list(table.published.columns if target.model and table.published.columns else table.columns)
    records = {cell.key: store.load(cell.key) for cell in cells if cell.key}
    rows: list[dict[str, Any]] = []
    groups = _groups(table, cells)
    for group in groups:
        mine = [cell for cell in cells if cell.group == group.name]
        finished = [(cell, record) for cell in mine if (record := records.get(cell.key)) is not None]
        reference = _reference(columns, finished, group)
        if reference is not None:
            rows.append(reference)
        for row in table.rows:
            if row.groups is not None and group.name and group.name not in row.groups:
                continue
            rows.append(_row(table, group, row, columns, mine, records))
    done = sum(record is not None for record in records.values())
    return ({"variant": variant} if variant else {}) | {
        "format": FORMAT,
        "name": table_name(table, variant),
        "title": table.title,
        "source": table.source,
        "about": table.about,
        "runs_on": _runs_on(table, target, groups),
        "said": _settings(table, target, cells),
        "columns": [_column(key) for key in columns],
        "paper_columns": table.paper_columns if any(row["paper"] for row in rows) else "",
        "rows": rows,
        "baseline": table.baseline,
        "curve": table.curve,
        "cells": {"finished": done, "all": len(records), "problems": sorted({c.problem for c in cells if c.problem})},
        "command": command,
        "seeds": sorted({cell.seed for cell in cells}),
        "versions": _versions(records.values()),
        "dqtool": dqtool_version(),
    }


def table_name(table: Table, variant: str) -> str:
    """Return the name of a table's files, with the suffix of a changed table."""
    return f"{table.name}-{variant}" if variant else table.name


def _column(key: str) -> dict[str, Any]:
    column = COLUMNS[key]
    return {"key": key, "label": column.label, "better": column.better, "decimals": column.decimals}


def _groups(table: Table, cells: Sequence[Cell]) -> list[Group]:
    known = {group.name: group for group in table.groups}
    return [known.get(name, Group(name)) for name in dict.fromkeys(cell.group for cell in cells)]


def _row(
    table: Table,
    group: Group,
    row: Row,
    columns: Sequence[str],
    cells: Sequence[Cell],
    records: Mapping[str, CellRecord | None],
) -> dict[str, Any]:
    mine = [cell for cell in cells if cell.row == row.name]
    finished = [(cell, record) for cell in mine if (record := records.get(cell.key)) is not None]

    def metrics_of(name: str | None) -> dict[int, Any]:
        """Return the metrics of the row of this name by seed."""
        return {
            cell.seed: record.metrics
            for cell in cells
            if cell.row == name and (record := records.get(cell.key)) is not None and record.metrics is not None
        }

    base, above = metrics_of(table.baseline), metrics_of(_above(table, row))
    values = {}
    for key in columns:
        column = COLUMNS[key]
        other = above if column.above else base
        found = {
            cell.seed: value
            for cell, record in finished
            if (value := _value(column, record, other.get(cell.seed))) is not None
        }
        if found:
            values[key] = _spread(list(found.values()))
    curves = [
        record.metrics["distill"].get(table.curve)
        for _, record in finished
        if table.curve and record.metrics is not None and "distill" in record.metrics
    ]
    return {
        "name": row.name,
        "group": group.name,
        "values": values,
        "paper": row.paper.get(group.name, ""),
        "note": row.note,
        "seeds": [cell.seed for cell, _ in finished],
        "failed": [record.failed for _, record in finished if record.failed is not None],
        "problem": next((cell.problem for cell in mine if cell.problem), None),
        "keys": [cell.key for cell, _ in finished],
        "paper_only": row.paper_only,
        "curves": [curve for curve in curves if curve],
        "iterations": iterations(mine[0]) if mine else "",
        "made_by": [{"seed": cell.seed, "key": cell.key, **provenance(cell)} for cell, _ in finished],
    }


def _above(table: Table, row: Row) -> str | None:
    """Return the name of the row above; None for the first row of the uncorrected or of the corrected ones."""
    names = [each.name for each in table.rows if each.name.endswith(CORRECTED) == row.name.endswith(CORRECTED)]
    at = names.index(row.name)
    return names[at - 1] if at else None


def _reference(
    columns: Sequence[str], finished: Sequence[tuple[Cell, CellRecord]], group: Group
) -> dict[str, Any] | None:
    """Return the row of the full-precision model, whose images all rows of a group and seed share; None without figures."""
    by_seed = {cell.seed: record.metrics for cell, record in finished if record.metrics is not None}
    values = {}
    for key in columns:
        found = [v for metrics in by_seed.values() if (v := COLUMNS[key].of_reference(metrics)) is not None]
        if found:
            values[key] = _spread(found)
    if not values and not group.paper_reference:
        return None
    return {
        "name": REFERENCE,
        "group": group.name,
        "values": values,
        "paper": group.paper_reference,
        "note": "",
        "seeds": sorted(by_seed),
        "failed": [],
        "problem": None,
        "keys": [],
        "paper_only": False,
        "curves": [],
    }


def _value(column: Column, record: CellRecord, baseline: Mapping[str, Any] | None) -> float | None:
    metrics = record.metrics
    if metrics is None:
        return None
    if column.relative is None:
        value = column.value(metrics)
    else:
        value = None if baseline is None else column.relative(metrics, baseline)
    return value if value is None or math.isfinite(value) else None


def _spread(values: list[float]) -> dict[str, Any]:
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "values": values}


def _runs_on(table: Table, target: Target, groups: Sequence[Group]) -> str:
    if target.model is not None:
        return f"on {target.model}"
    pairs = dict.fromkeys((group.model or table.model, group.stands_for or table.stands_for) for group in groups)
    return "on the embedded " + ", ".join(
        model.removeprefix("zoo:") + (f" in place of {stands}" if stands else "") for model, stands in pairs
    )


def _settings(table: Table, target: Target, cells: Sequence[Cell]) -> str:
    """Return a sentence with the schedule and the settings that all cells share."""
    schedule = SCHEDULES[target.schedule or table.schedule]
    embedded = target.model is None or target.schedule is not None
    parts = [f"Schedule `{schedule.name}`: {schedule.summary}"] if embedded and "distill" in table.stages else []
    known = [{step.stage: step.parameters for step in cell.steps} for cell in cells if cell.steps]
    for stage, key, text in (
        ("calibrate", "steps", "{} sampling steps"),
        ("calibrate", "samples", "{} calibration points"),
        ("eval", "samples", "{} images"),
    ):
        values = sorted({found[stage][key] for found in known if stage in found})
        if values:
            parts.append(text.format(" or ".join(map(str, values))))
    seeds = sorted({cell.seed for cell in cells})
    parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return "; ".join(parts) + "."


def _versions(records: Iterable[CellRecord | None]) -> list[str]:
    """Return the different sets of package versions that computed these cells."""
    found = {
        " ".join(f"{name} {version}" for name, version in sorted(record.environment.versions.items()))
        for record in records
        if record is not None
    }
    return sorted(found)


def curve_figure(summary: Mapping[str, Any]) -> str | None:
    """Return the chart of the table's training curves, an SVG with its style sheet; None without curves."""
    chart = curve_chart(summary)
    return None if chart is None else chart.replace(">", f"><style>{CHART_STYLE}</style>", 1) + "\n"


def render_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table as Markdown."""
    grouped = any(row["group"] for row in summary["rows"])
    source = f" ({summary['source']} of arXiv 2409.14307)" if summary["source"] else ""
    lines = [f"# {summary['title']}{source}, {summary['runs_on']}", "", summary["said"]]
    if summary["about"]:
        lines += ["", summary["about"]]
    head = ["", "row"] if grouped else ["row"]
    head += [column["label"] + ARROWS[column["better"]] for column in summary["columns"]]
    trains = any(row.get("iterations") for row in summary["rows"])
    if trains:
        head.append("iterations (of its paper)")
    if summary["paper_columns"]:
        head.append(f"paper: {summary['paper_columns']}")
    lines += ["", _line(head), _line(["---"] * len(head))]
    previous = None
    for row in summary["rows"]:
        cells = [("" if row["group"] == previous else row["group"])] if grouped else []
        previous = row["group"]
        cells.append(row["name"])
        for column in summary["columns"]:
            value = row["values"].get(column["key"])
            shown = figure_text(value, column["decimals"]) if not row["paper_only"] else ""
            if row["failed"] and value is None:
                shown = "failed"
            elif value is not None and is_best(summary, row, column):
                shown = f"**{shown}**"
            cells.append(shown)
        if trains:
            cells.append(row.get("iterations") or "–")
        if summary["paper_columns"]:
            cells.append(row["paper"])
        lines.append(_line(cells))
    lines += _notes(summary)
    return "\n".join(lines) + "\n"


def _notes(summary: Mapping[str, Any]) -> list[str]:
    notes = [f"{row['name']}: {row['note']}" for row in summary["rows"] if row["note"]]
    notes += [f"{row['name']}: {text}" for row in summary["rows"] for text in dict.fromkeys(row["failed"])]
    notes = list(dict.fromkeys(notes))
    cells = summary["cells"]
    if cells["finished"] < cells["all"] or cells["problems"]:
        notes.insert(0, f"Incomplete: {cells['finished']} of {cells['all']} cells are finished.")
        notes += [f"Can't be run here: {text}" for text in cells["problems"]]
    lines = [line for note in notes for line in ("", note)]
    if summary["baseline"] and any(column["key"] == "excess" for column in summary["columns"]):
        lines += [
            "",
            f"Excess left: the distance to the training images that a row adds to full precision's, in percent of what {summary['baseline']} adds; "
            f"empty if {summary['baseline']} adds nothing.",
        ]
    if any(column["key"] in FLOORS for column in summary["columns"]):
        lines += [
            "",
            "Full precision's own distance to full precision is the floor: the distance of two sets of its images with "
            "different noise. Images of equal noise come in pairs, and a distance below the floor says how well pairs "
            "match; PSNR is the paired measure.",
        ]
    if len(summary["seeds"]) > 1:
        lines += [
            "",
            "Mean ± sample standard deviation over the seeds. A seed determines calibration, training and images.",
        ]
    versions = "; ".join(summary["versions"])
    return [*lines, "", f"Made by `{summary['command']}`" + (f" with {versions}." if versions else ".")]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

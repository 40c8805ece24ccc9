"""A table of comparisons on the page: every row, marks of the best, and notes on missing cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dqtool.page.comparison import comparison_section, curve_chart
from dqtool.page.document import Charts, Note, Table
from dqtool.page.results import find_tables


def summary(**changes: Any) -> dict[str, Any]:
    def row(name: str, value: float | None, **more: Any) -> dict[str, Any]:
        values = {} if value is None else {"psnr": {"mean": value, "deviation": 0.5, "values": [value]}}
        found = {"name": name, "group": "4/4", "values": values, "paper": "9.63", "failed": [], "curves": []}
        return found | more

    rows = [
        row("full precision", None),
        row("none", 20.0, curves=[[3.0, 2.0, 1.0], [5.0, 4.0]]),
        row("WD", 30.0),
        row("diverged", None, failed=["not finite"]),
    ]
    return {
        "format": "dqtool-table/1",
        "name": "t",
        "title": "Scaling",
        "source": "Table 14",
        "about": "About.",
        "runs_on": "on the embedded digits-ddpm",
        "said": "Said.",
        "columns": [{"key": "psnr", "label": "PSNR, dB", "better": 1, "decimals": 1}],
        "paper_columns": "FID",
        "rows": rows,
        "cells": {"finished": 3, "all": 4, "problems": []},
        "command": "make t",
        "versions": ["torch 2"],
    } | changes


def test_rows_best_and_what_is_missing() -> None:
    section = comparison_section(summary())
    table = next(block for block in section.blocks if isinstance(block, Table))
    assert table.columns == ["group", "row", "PSNR, dB ↑", "paper: FID"]
    assert [row[2].text for row in table.rows] == ["–", "20.0 ± 0.5", "30.0 ± 0.5", "failed"]
    assert [row[2].best for row in table.rows] == [False, False, True, False]
    assert any(isinstance(block, Note) and "3 of 4" in block.text for block in section.blocks)
    assert any(isinstance(block, Charts) for block in section.blocks)


def test_curves_are_means_over_seeds() -> None:
    chart = curve_chart(summary())
    assert chart is not None
    assert "from 4 to 3" in chart
    without = summary()
    without["rows"][1]["curves"] = []
    assert curve_chart(without) is None


def test_tables_are_found_among_other_files(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(summary()))
    (tmp_path / "other.json").write_text("{}")
    assert [table["name"] for table in find_tables([str(tmp_path)])] == ["t"]


def test_tables_of_one_name_are_all_found_and_copies_once(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(summary()))
    (tmp_path / "copy.json").write_text(json.dumps(summary(), indent=1))
    (tmp_path / "t-published.json").write_text(json.dumps(summary(runs_on="on model.ckpt")))
    found = find_tables([str(tmp_path), str(tmp_path / "t.json")])
    assert sorted(table["runs_on"] for table in found) == ["on model.ckpt", "on the embedded digits-ddpm"]


def test_the_heading_says_the_variant() -> None:
    assert comparison_section(summary()).title == "Scaling (Table 14)"
    assert comparison_section(summary(variant="smoke")).title == "Scaling (Table 14), smoke"

"""What a group of results is compared with, and what sets it apart from the model's other groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dqtool.artifacts import Manifest
from dqtool.page.document import Charts, Paragraph, Table
from dqtool.page.results import Result, chain_key
from dqtool.page.sections import quality_section
from dqtool.page.tables import result_table


def made(name: str, reference: str | None = None, digest: str = "e", **parameters: Any) -> Result:
    """A result of 2048 images with its figures, and with `reference` in place of the full-precision model."""
    metrics: dict[str, Any] = {
        "samples": 2048,
        "fd.digits": 2.18,
        "fd.digits_ratio": 0.986,
        "reference": {"samples": 2048, "fd.digits": 2.21},
        "cost": {
            "bytes": 1_350_000,
            "bytes_float32": 6_300_000,
            "size_ratio": 4.7,
            "bops": 2.03e9,
            "bops_float32": 57.5e9,
            "bops_ratio": 28.3,
        },
    }
    if reference is not None:
        metrics["reference_is"] = reference
    inputs = [
        {"name": "exported", "sha256": "a" * 64, "stage": "export"},
        {"name": "reference", "sha256": digest * 64, "stage": None},
    ]
    sampling = {"scheduler": {"_class_name": "DDIMScheduler"}, "steps": 20, "eta": 0.0}
    manifest = Manifest(
        "eval",
        "f" * 64,
        inputs=inputs,
        model={"source": "zoo:digits-ddpm", "source_sha256": "b" * 64},
        pipeline={"sampling": sampling},
        parameters={"samples": 2048, "seed": 0} | parameters,
        metrics=metrics,
    )
    return Result(name, Path(f"{name}.json"), manifest)


def test_a_quantized_reference_is_not_called_full_precision() -> None:
    named = "exported in the simulate runtime"
    table = result_table([made("onednn", named)])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["result"].text == named
    assert row["fd.digits ↓"].text == "2.21"
    assert [row[column].text for column in ("bits", "size, MB ↓", "bit operations, G ↓")] == ["–", "–", "–"]
    assert f"× compares with {named}, ÷ with full precision" in table.caption
    section = quality_section([made("onednn", named)], [])
    assert f"The dashed line is {named}." in next(b.text for b in section.blocks if isinstance(b, Paragraph))
    charts = next(block for block in section.blocks if isinstance(block, Charts)).charts
    assert all("full precision" not in svg and "hollow" not in svg and ">reference<" in svg for _, svg, _ in charts)


def test_a_quantized_reference_without_figures_has_no_row() -> None:
    result = made("onednn", "exported in the simulate runtime")
    del result.metrics["reference"]
    assert [row[1].text for row in result_table([result]).rows] == ["onednn"]


def test_full_precision_keeps_its_row_and_its_line() -> None:
    table: Table = result_table([made("w6a6")])
    assert [cell.text for cell in table.rows[0]] == [
        "",
        "full precision",
        "32/32",
        "–",
        "2048",
        "2.21",
        "6.30",
        "57.50",
        "–",
    ]
    section = quality_section([made("w6a6")], [])
    assert any(isinstance(b, Paragraph) and "The dashed line is full precision." in b.text for b in section.blocks)


def test_results_beside_different_references_are_not_compared() -> None:
    keys = [
        chain_key(result)
        for result in (
            made("float"),
            made("onednn", "a in the simulate runtime"),
            made("moved", "b in the simulate runtime"),
            made("other", "a in the simulate runtime", "c"),
        )
    ]
    assert keys[1] == keys[2]  # one directory, wherever it lies
    assert len(set(keys)) == 3

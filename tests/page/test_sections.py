"""Sections of the page: the reference of a group of results, and its differences from other groups of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dqtool.artifacts import Manifest
from dqtool.artifacts.bench_report import BenchedModel, BenchReport, LoadRow, MachineRecord, SpeedRow
from dqtool.artifacts.records import EvalRecord, InputRecord, ModelRecord, ParametersRecord, PipelineRecord
from dqtool.artifacts.schema import unchecked, without
from dqtool.errors import ArtifactError
from dqtool.page.document import Cell, Charts, Note, Page, Paragraph, Section, Table
from dqtool.page.figures import extractors, quality_key
from dqtool.page.html import render_html
from dqtool.page.markdown import render_markdown
from dqtool.page.results import Bench, Result, chain_key, find_results
from dqtool.page.sections import quality_section, results_section
from dqtool.page.tables import bench_tables, result_table


def made(name: str, reference: str | None = None, digest: str = "e", **parameters: Any) -> Result:
    """Make a result of 2048 images with its figures. `reference` takes the place of the full-precision model."""
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
    model = {"class": "UNet2DModel", "config": {}, "family": "unet2d", "source": "zoo:digits-ddpm"}
    manifest = Manifest(
        "eval",
        "f" * 64,
        inputs=[unchecked(entry, InputRecord) for entry in inputs],
        model=unchecked(model | {"source_sha256": "b" * 64}, ModelRecord),
        pipeline=unchecked({"sampling": sampling}, PipelineRecord),
        parameters=unchecked({"samples": 2048, "seed": 0} | parameters, ParametersRecord),
        metrics=unchecked(metrics, EvalRecord),
    )
    return Result(name, Path(f"{name}.json"), manifest)


def test_a_distance_to_the_reference_is_shown_and_not_plotted() -> None:
    result = made("exported")
    more = {"fd.digits_from_reference": 0.1234, "extractor": {"name": "digits-classifier", "sha256": "c" * 64}}
    result.manifest.metrics = unchecked({**result.figures, **more}, EvalRecord)
    table = result_table([result])
    column = list(table.columns).index("fd.digits to full precision ↓")
    assert "0.123" in [row[column].text for row in table.rows]
    assert quality_key([result]) == "fd.digits"
    assert dict(extractors(result.metrics))["fd.digits_from_reference"].name == "digits-classifier"


def test_a_quantized_reference_is_not_called_full_precision() -> None:
    named = "exported in the simulate runtime"
    table = result_table([made("cpu", named)])
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert row["result"].text == named
    assert row["fd.digits ↓"].text == "2.21"
    assert [row[column].text for column in ("bits", "size, MB ↓", "bit operations, G ↓")] == ["–", "–", "–"]
    assert f"× compares with {named}, ÷ with full precision" in table.caption
    section = quality_section([made("cpu", named)], [])
    assert f"The dashed line is {named}." in next(b.text for b in section.blocks if isinstance(b, Paragraph))
    charts = next(block for block in section.blocks if isinstance(block, Charts)).charts
    assert all("full precision" not in svg and "hollow" not in svg and ">reference<" in svg for _, svg, _ in charts)


def test_a_quantized_reference_without_figures_has_no_row() -> None:
    result = made("cpu", "exported in the simulate runtime")
    result.manifest.metrics = without(result.metrics, "reference")
    assert [row[1].text for row in result_table([result]).rows] == ["cpu"]


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
            made("cpu", "a in the simulate runtime"),
            made("moved", "b in the simulate runtime"),
            made("other", "a in the simulate runtime", "c"),
        )
    ]
    assert keys[1] == keys[2]  # the same directory in two places
    assert len(set(keys)) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"guidance": 7.5}, ("guidance 7.5", "the model's own guidance")),
        ({"prompts": ["a three", "a four"]}, ("2 prompts (77366d424572…)", "the model's own prompts")),
        ({"image_size": 256}, ("centres of 256 pixels", "whole images")),
        ({"correct_noise": True}, ("with PTQD's correction", "without PTQD's correction")),
        (
            {"files": {"ref_stats": {"file": "church.npz", "sha256": "c" * 64}}},
            ("reference statistics church.npz (cccccccccccc…)", "no reference statistics"),
        ),
        ({"steps": 50}, ("50 steps", "20 steps")),
        ({"sampler": "plms"}, ("plms", "DDIMScheduler")),
    ],
)
def test_results_sampled_or_judged_otherwise_are_apart_and_the_heading_says_why(
    given: dict[str, Any], said: tuple[str, str]
) -> None:
    changed, plain = made("changed", **given), made("plain")
    assert chain_key(changed) != chain_key(plain)
    assert chain_key(changed) == chain_key(made("again", seed=1, **given))
    titles = [results_section([a], [b]).title for a, b in ((changed, plain), (plain, changed))]
    assert titles == [f"digits-ddpm, {each}" for each in said]


def test_headings_tell_equal_names_apart_by_their_contents() -> None:
    named = "exported in the simulate runtime"
    first, second = made("first", named), made("second", named, "c")
    assert results_section([first], [second]).title == f"digits-ddpm, against {named} (eeeeeeeeeeee…)"
    assert results_section([second], [first, made("float")]).title.endswith("(cccccccccccc…)")
    assert results_section([made("float")], [first]).title == "digits-ddpm, against full precision"
    assert results_section([first]).title == "digits-ddpm"


def test_guidance_that_was_calibrated_is_the_one_that_is_asked_for() -> None:
    calibrated, asked, other = made("calibrated"), made("asked", guidance=1.5), made("other", guidance=3.0)
    for result in (calibrated, asked, other):
        sampling = replace(result.manifest.pipeline.sampling, guidance=1.5)
        result.manifest.pipeline = replace(result.manifest.pipeline, sampling=sampling)
    assert chain_key(calibrated) == chain_key(asked) != chain_key(other)


@pytest.mark.parametrize("render", [render_html, render_markdown])
def test_texts_of_files_bring_neither_control_characters_nor_markup(render: Callable[[Page], str]) -> None:
    text = "\x1b[2J\x07\u202e<script>alert(1)</script>[a](javascript:b)|"
    table = Table("caption " + text, ["a " + text], [[Cell(text, detail=text)]])
    made = render(Page(text, text, [Section(text, blocks=[Paragraph(text), Note(text), table])]))
    assert all(letter.isprintable() or letter == "\n" for letter in made)
    assert "<script" not in made.replace("\\<", "")
    if render is render_markdown:
        assert "](javascript" not in made.replace("\\]", "")


def test_a_benchmark_without_counts_of_memory_is_shown() -> None:
    machine = MachineRecord("a processor", None, 1, None, "", "Linux", {})
    model = BenchedModel("UNet2DModel", 1, "4/4", 1, "exported")
    speed = {"1": [SpeedRow("cpu", 0.001, 0.001, 0.002, 5, None)]}
    report = BenchReport("dqtool bench", model, machine, 0.0, speed, [LoadRow("cpu", 0.1, 0.2, None, 2**20)])
    of_speed, of_loads = bench_tables(Bench(Path("bench.json"), report))
    assert [cell.text for cell in of_speed.rows[0]][:2] == ["cpu", "1.0"]
    assert [cell.text for cell in of_loads.rows[0]] == ["cpu", "0.10", "0.20", "–", "1"]


def test_a_malformed_benchmark_is_refused_with_the_key(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"speed": {}, "machine": {}, "model": {}, "load": [], "command": "", "seconds": 1}))
    with pytest.raises(ArtifactError, match="model.class must be there"):
        find_results([str(path)])

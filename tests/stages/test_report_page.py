from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from conftest import Run

from dqtool.core.affine import fake_quantize
from dqtool.errors import UsageError
from dqtool.page.dilated_inputs import dilated_inputs
from dqtool.page.quantization_errors import quantization_errors
from dqtool.page.results import Result, find_results
from dqtool.stages.options.report import ReportOptions
from dqtool.stages.report_page import write_report
from dqtool.stages.shared.artifact_models import teacher_of
from dqtool.stages.shared.settings import RunSettings


@pytest.fixture(scope="module")
def plain(made: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Make a result of untrained PTQ at 4/4 with a picture."""
    directory = tmp_path_factory.mktemp("ptq")
    for line in (
        f"distill {made / 'calibrated.safetensors'} --iters 0",
        "export",
        f"eval --samples 4 --grid samples.png --reference {made / 'tiny'}",
    ):
        result = run(*line.split(), cwd=directory)
        assert result.returncode == 0, result.stderr
    return find_results([str(directory)])[0][0]


@pytest.fixture(scope="module")
def page(made: Path, plain: Result, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Write the page of a trained and a PTQ result of one model."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    places = (str(made / "eval.json"), str(plain.path.parent))
    assert write_report(ReportOptions(places, str(output)), RunSettings(quiet=True)) == str(output)
    return output.read_text()


class Outline(HTMLParser):
    """Parser that checks nesting, and collects tags with their attributes, and text by heading."""

    VOID = ("meta", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_has_every_section_and_nothing_from_elsewhere(page: str):
    outline = Outline(page)
    headings = re.findall(r"<h[123][^>]*>([^<]*)<", page)
    assert headings == [
        "Quantization report",
        "tiny",
        "Quality against cost",
        "Samples",
        "Error by layer",
        "Error by time step",
        "Activations before and after dilation",
        "How these results were made",
        "Left out",
    ]
    for tag, attributes in outline.tags:
        assert tag != "script"
        for key in ("src", "href"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#"))
    assert "url(" not in page
    assert "@import" not in page
    assert "prefers-color-scheme: dark" in page
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    assert page.count("<svg") == page.count("<svg xmlns") >= 8
    assert "data:image/png;base64," in page


def test_missing_parts_say_why_once_folded_at_the_end(page: str):
    before, _, last = page.partition("<summary>Left out of this page")
    assert last.startswith(": ")
    assert "no report of `dqtool bench" in last
    assert "no picture of" in last
    assert "no picture of" not in before


def test_the_same_results_give_the_same_page(page: str, made: Path, plain: Result, tmp_path: Path):
    output = tmp_path / "again.html"
    write_report(ReportOptions((str(made / "eval.json"), str(plain.path.parent)), str(output)), RunSettings(quiet=True))
    assert output.read_text() == page


def test_a_lone_report_leaves_out_what_its_artifacts_would_tell(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("only.json").write_bytes((made / "eval.json").read_bytes())
    write_report(ReportOptions(("only.json",), format="md"), RunSettings(quiet=True))
    text = Path("report.md").read_text()
    assert "| 1 | only | 4/4 |" in text
    assert "errors of weights and activations of only: the distilled artifact" in text.replace("\\", "")
    assert "no calibrated artifact was found" in text
    assert text.count("Left out of this page") == 1
    assert "training not recorded here" in text


def test_a_damaged_artifact_is_left_out_with_its_fault(chain: Path):
    data = (chain / "distilled.safetensors").read_bytes()
    (chain / "distilled.safetensors").write_bytes(data[:-4])
    write_report(ReportOptions((str(chain),), str(chain / "page.md")), RunSettings(quiet=True))
    assert "The file is truncated" in (chain / "page.md").read_text()


def test_errors_of_ptq_are_those_of_its_grids(plain: Result):
    errors = quantization_errors(plain)
    assert len(errors.timesteps) == 4
    layers = {layer.name: layer for layer in plain.manifest.layers if layer.kind != "attention"}
    assert errors.weights.keys() == layers.keys()
    for parts in errors.weights.values():  # without training, the error of the grid is that of the artifact
        assert parts.total == pytest.approx(parts.clipping + parts.rounding, rel=0.02, abs=1e-9)
    ends = {name for name, layer in layers.items() if layer.bits == (8, 8)}
    assert max(errors.weights[name].total for name in ends) < min(
        parts.total for name, parts in errors.weights.items() if name not in ends
    )
    assert all(len(parts) == 4 for parts in errors.activations.values())
    assert any(name.endswith(".probs") for name in errors.activations)


def test_the_error_of_an_activation_is_that_of_the_values_behind_its_histogram(plain: Result):
    """The first layer's input is the trajectory itself, so that its quantizer's error is known without a histogram."""
    calibrated, packed = plain.open("calibrate").tensors(), plain.open("distill").tensors()
    measured = quantization_errors(plain).activations["conv_in"]
    for row in range(4):
        x = calibrated["trajectory.x"][calibrated["trajectory.rows"] == row] / packed["conv_in.dilation"]
        scale, zero = packed["conv_in.input_scale"][row], packed["conv_in.input_zero_point"][row].float()
        error = float((fake_quantize(x, scale, zero, 8) - x).square().sum() / x.square().sum())
        assert measured[row].total == pytest.approx(error, rel=0.35)


def test_before_dilation_the_range_is_what_calibration_said(plain: Result):
    artifact = plain.open("calibrate")
    inputs = dilated_inputs(artifact, lambda: teacher_of(artifact.manifest, artifact.tensors()), 64)
    ratios = artifact.manifest.metrics.as_read["activation_range_ratios"]
    assert [each.name for each in inputs] == sorted(ratios, key=ratios.get)[: len(inputs)]
    for each in inputs:
        widths = [
            max(0.0, *(high for _, high in spans)) - min(0.0, *(low for low, _ in spans))
            for spans in (each.range_before, each.range_after)
        ]
        assert widths[1] / widths[0] == pytest.approx(ratios[each.name], rel=1e-3)
        for shares in (*each.before, *each.after):
            assert sum(shares) == pytest.approx(1, abs=1e-6)


def test_timings_join_the_result_they_belong_to(chain: Path):
    (result,), _ = find_results([str(chain)])
    row = {"note": "", "p10": 0.01, "p90": 0.02, "calls": 3}
    report = {
        "command": "dqtool bench exported",
        "seconds": 1.0,
        "model": {
            "class": "UNet2DModel",
            "parameters": 1000,
            "file_bytes": 500,
            "bits": "4/4",
            "from": "exported",
            "sha256": result.measured_sha256,
        },
        "machine": {
            "processor": "one",
            "cores": 1,
            "threads": 1,
            "flags": [],
            "expect": "",
            "platform": "Linux",
            "versions": {},
        },
        "speed": {
            "1": [
                row | {"contender": "simulate", "median": 0.0125, "ratio": 2.0, "baseline": False},
                row | {"contender": "fp32", "median": 0.025, "ratio": 1.0, "baseline": True},
            ]
        },
        "load": [],
    }
    (chain / "bench.json").write_text(json.dumps(report))
    write_report(ReportOptions((str(chain),), str(chain / "page.html")), RunSettings(quiet=True))
    page = (chain / "page.html").read_text()
    assert "time of a step, ms" in page
    assert "<td" in page.split("One step at batch 1")[-1]
    assert "12.5" in page.split(">Speed<")[1]


@pytest.mark.parametrize(
    ("options", "kind", "path"),
    [
        ({}, "html", "report.html"),
        ({"format": "md"}, "md", "report.md"),
        ({"output": "x.md"}, "md", "x.md"),
        ({"output": "x"}, "html", "x"),
        ({"output": "x", "format": "md"}, "md", "x"),
    ],
)
def test_formats(options: dict[str, str], kind: str, path: str):
    made = ReportOptions(**options)
    assert (made.kind, made.path) == (kind, path)


@pytest.mark.parametrize("options", [{"format": "pdf"}, {"output": "x.html", "format": "md"}, {"output": "x.json"}])
def test_formats_that_make_no_sense(options: dict[str, str]):
    with pytest.raises(UsageError):
        ReportOptions(**options)


def test_torch_is_left_as_it_was(page: str):
    assert torch.is_grad_enabled()

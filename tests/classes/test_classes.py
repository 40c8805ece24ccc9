"""A sample of the classes in recipes/results/classes.json still does what the committed table says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from class_table import measure, worse
from denoisers import DENOISERS

RESULTS = Path(__file__).parents[2] / "recipes" / "results" / "classes.json"
SAMPLE = ("UNet1DModel", "PriorTransformer", "WanTransformer3DModel", "QwenImageTransformer2DModel")
"""Small networks: convolutions alone, vectors, a video, and sizes in a list for each sample."""


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_does_what_the_table_says(name: str, tmp_path: Path) -> None:
    rows = {row["class"]: row for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]}
    found = measure(name, tmp_path, bits=("8/8",), engines=("cpu",), train=name == SAMPLE[0])
    assert worse(rows[name], found, without=("openvino", "train"), bits=("8/8",)) == []
    assert found["stages"].get("train", "yes") == "yes"


def test_the_table_has_every_class() -> None:
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert [row["class"] for row in rows] == list(DENOISERS)
    assert len(rows) >= 30
    table = RESULTS.with_suffix(".md").read_text(encoding="utf-8")
    assert all(f"| {row['class']} |" in table for row in rows)

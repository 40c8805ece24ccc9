"""`make quality-paths`: the script runs every cell, and the committed table keeps within its tolerance."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import quality_paths


def test_every_cell_of_an_unconditional_model_runs(made: Path) -> None:
    row = quality_paths.compare("tiny", made / "tiny", made / "exported", "made here", images=2)
    assert list(row["psnr"]) == [quality_paths.CALIBRATED, *quality_paths.SAMPLERS, quality_paths.IMAGE]
    assert (row["steps"], row["guidance"], row["runtime"]) == (4, 1.0, "cpu")
    assert all(5 < value < 100 for value in row["psnr"].values())
    text = quality_paths.text_of([row])
    assert f"| tiny | `made here` | {', '.join(row['bits'])} | 2 | {row['psnr']['calibrated']:.1f} |" in text


def test_a_loss_is_named() -> None:
    row = {"model": "m", "psnr": {"calibrated": 30.0, "UniPC 8": 28.4, "DDIM 20": 28.6}}
    assert quality_paths.losses(row) == ["m, UniPC 8: 28.4 dB, and 30.0 dB as calibrated"]


def test_the_committed_table_is_within_the_tolerance() -> None:
    path = quality_paths.OUTPUT.with_suffix(".json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["model"] for row in rows] == sorted(quality_paths.MODELS)
    assert not [sentence for row in rows for sentence in quality_paths.losses(row)]
    assert all(row["images"] >= 64 for row in rows)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == quality_paths.text_of(rows)

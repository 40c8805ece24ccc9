"""Options with unknown or impossible values: exit code 2, one paragraph with the choices, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run
from helpers import refused

RECIPE = """\
model: tiny
stages:
  dilate:
    scaling: wd
  calibrate:
    steps: 4
    sampels: 16
"""


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("distill", "--bits", "9/4"), "9/4"),
        (("calibrate", "--eta", "inf"), "--eta"),
        (("distill", "--bits", "9" * 5000 + "/4"), "bit width"),
        (("distill", "--keep", "(" * 500 + "=4/4"), "regular expression"),
        (("calibrate", "--guidance", "nan"), "--guidance"),
        (("calibrate", "--steps", "1001", "--samples", "2000"), "--steps"),
        (("calibrate", "--samples", str(10**30)), "--samples"),
        (("calibrate", "-o", "two\nlines.safetensors"), "--output"),
        (("distill", "--bits", "4/1"), "4/1"),
        (("distill", "--bits", "4"), "W/A"),
        (("distill", "--bits", "four/4"), "four/4"),
        (("distill", "--keep", "conv_in"), "REGEX=W/A"),
        (("distill", "--keep", "conv_in=9/9"), "9/9"),
        (("distill", "--keep", "(=8/8"), "regular expression"),
        (("distill", "--keep", "no_such_layer=8/8"), "no_such_layer"),
        (("distill", "--method", "magic"), "bkd"),
        (("distill", "--iters", "-1"), "--iters"),
        (("distill", "--softmax-bits", "9"), "--softmax-bits"),
        (("dilate", "tiny", "--scaling", "magic"), "wd"),
        (("dilate", "tiny", "--scaling", "smoothquant", "--force"), "calibrate --scaling smoothquant"),
        (("dilate", "tiny", "--scaling", "auto"), "calibrate --scaling auto"),
        (("dilate", "tiny", "--stats", "calibrated.safetensors"), "calibrate --scaling"),
        (("dilate", "tiny", "--bits", "4/4"), "calibrate --bits"),
        (("calibrate", "dilated.safetensors", "--scaling", "wd"), "dilate --scaling wd"),
        (("calibrate", "dilated.safetensors", "--bits", "nine"), "bits"),
        (("dilate",), "model"),
        (("calibrate", "--sampler", "magic"), "ddim"),
        (("calibrate", "--steps", "0"), "--steps"),
        (("calibrate", "--steps", "many"), "--steps"),
        (("calibrate", "--samples", "3", "--steps", "4"), "--samples"),
        (("calibrate", "--batch-size", "0"), "--batch-size"),
        (("export", "--format", "magic"), "dense"),
        (("eval", "--metrics", "magic"), "cost"),
        (("eval", "--runtime", "magic", "--force"), "simulate"),
        (("sample", "exported", "-n", "0"), "--number"),
        (("dilate", "tiny", "--device", "quantum"), "--device"),
        (("dilate", "tiny", "--no-such-option"), "--no-such-option"),
        (("dilate", "tiny", "too", "many"), "many"),
        (("dilute", "tiny"), "dilate"),
        (("zoo",), "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_command_lines(run: Run, made: Path, arguments: tuple[str, ...], word: str):
    assert word in refused(run, made, 2, *arguments)


class TestRecipe:
    @pytest.fixture
    def work(self, chain: Path) -> Path:
        (chain / "r.yaml").write_text(RECIPE)
        return chain

    def test_unknown_option_names_the_line_and_the_nearest(self, run: Run, work: Path):
        text = refused(run, work, 2, "run", "r.yaml")
        assert "r.yaml:7" in text
        assert "sampels" in text
        assert "Did you mean samples?" in text

    @pytest.mark.parametrize(
        ("old", "new", "line"),
        [
            ("stages:", "stagse:", 2),
            ("  dilate:", "  dilute:", 3),
            ("    scaling: wd", "    scaling: [wd", 5),
            ("    steps: 4", "    steps: soon", 6),
            ("    scaling: wd", "    artifact: x", 4),
        ],
    )
    def test_other_mistakes_name_the_line(self, run: Run, work: Path, old: str, new: str, line: int):
        (work / "r.yaml").write_text(RECIPE.replace("sampels", "samples").replace(old, new))
        assert f"r.yaml:{line}" in refused(run, work, 2, "run", "r.yaml")

    @pytest.mark.parametrize(
        "override", ["calibrate.sampels=4", "calibrate.steps=soon", "distill.bits=4/4", "steps=4", "calibrate.steps"]
    )
    def test_overrides(self, run: Run, work: Path, override: str):
        (work / "r.yaml").write_text(RECIPE.replace("sampels", "samples"))
        assert f"--set {override}" in refused(run, work, 2, "run", "r.yaml", "--set", override)

    def test_a_number_out_of_range_is_refused_before_anything_runs(self, run: Run, work: Path):
        (work / "r.yaml").write_text(RECIPE.replace("sampels", "samples"))
        assert "--steps" in refused(run, work, 2, "run", "r.yaml", "--set", "calibrate.steps=0")

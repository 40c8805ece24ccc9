from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run
from helpers import load_json, refused

from dqtool.bench import probe

QUICK = ("--runtime", "simulate", "--against", "fp32", "--batch", "1,2", "--seconds", "0", "--no-memory")


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load contenders in this process, because fresh ones take seconds to import torch (tests/bench/test_probe.py)."""
    monkeypatch.setattr(probe, "_child", lambda request: (probe.answer(request, lambda: None), 1 << 40))


def test_the_report_goes_to_standard_output(run: Run, made: Path):
    result = run("bench", "exported", *QUICK, "--quiet", cwd=made)
    assert (result.returncode, result.stderr) == (0, "")
    assert "times faster" in result.stdout
    assert "UNet2DModel" in result.stdout
    assert "batch 2" in result.stdout
    assert " ".join(["command    dqtool bench exported", *QUICK]) in result.stdout


def test_json_is_one_object_and_the_directory_may_be_left_out(run: Run, made: Path):
    content = load_json(run("bench", *QUICK, "--json", cwd=made).stdout)
    assert set(content) >= {"model", "machine", "speed", "load"}
    assert set(content["speed"]) == {"1", "2"}


def test_a_dry_run_measures_nothing(run: Run, made: Path):
    result = run("bench", "--arch", "sd14", "--dry-run", cwd=made)
    assert result.returncode == 0, result.stderr
    assert "would time auto, fp32" in result.stdout
    assert "batch 2" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("bench", "exported", "--batch", "1,x"), 2),
        (("bench", "exported", "--batch", "0"), 2),
        (("bench", "exported", "--against", "fp31"), 2),
        (("bench", "exported", "--runtime", "fast"), 2),
        (("bench", "exported", "--arch", "sd14"), 2),
        (("bench", "--arch", "sd99"), 2),
        (("bench", "nowhere"), 4),
        (("bench", "dilated.safetensors"), 3),
        (("bench", "exported", "-o", "report.txt"), 2),
    ],
)
def test_what_is_refused(run: Run, made: Path, arguments: tuple[str, ...], code: int):
    refused(run, made, code, *arguments)

"""The earlier name of a runtime works wherever a user types it or a file holds it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.runtimes import RUNTIMES, runtime_name
from dqtool.runtimes.choice import _file, recalled_timings
from dqtool.stages.bench import _runtimes


def test_names_that_are_mapped() -> None:
    assert runtime_name("onednn") == "cpu"
    assert [runtime_name(name) for name in (*RUNTIMES, "auto", "magic")] == [*RUNTIMES, "auto", "magic"]


def test_python_and_environment(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dqtool.load(str(made / "exported"), "onednn").runtime == "cpu"
    monkeypatch.setenv("DQTOOL_RUNTIME", "onednn")
    assert dqtool.load(str(made / "exported")).runtime == "cpu"
    assert dqtool.DqtoolConfig(runtime="onednn").runtime == "cpu"


def test_bench() -> None:
    assert _runtimes(["onednn", "cpu", "simulate"]) == ["cpu", "simulate"]


def test_remembered_choices(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path))
    artifact = open_artifact(str(made / "exported"), ["export"])
    kept = _file(artifact)
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"seconds": {"1": {"onednn": 1.0, "openvino": 2.0}}}))
    assert recalled_timings(artifact) == {1: {"cpu": 1.0, "openvino": 2.0}}

"""`dqtool.load`: choosing a runtime, and what is said when one can't run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dqtool
from dqtool import runtimes
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.runtimes import onednn


def test_auto_says_what_it_takes(made: Path, capsys: pytest.CaptureFixture) -> None:
    network = dqtool.load(str(made / "exported"))
    said = capsys.readouterr().err
    assert "runtime: " in said
    assert network(torch.randn(1, 1, 8, 8), 0).sample.shape == (1, 1, 8, 8)


def test_auto_falls_back_and_says_why(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for runtime in runtimes.RUNTIMES.values():
        if runtime.name != "simulate":
            monkeypatch.setattr(runtime.engine(), "available", lambda: "this is a test")
    network = dqtool.load(str(made / "exported"), "auto")
    said = capsys.readouterr().err
    assert "not onednn, this is a test" in said
    assert "runtime: simulate" in said
    assert network(torch.randn(1, 1, 8, 8), 0).sample.shape == (1, 1, 8, 8)


def test_a_runtime_that_cannot_run_here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "available", lambda: "the processor lacks AVX2")
    with pytest.raises(EnvironmentFault, match="lacks AVX2"):
        dqtool.load(str(made / "exported"), "onednn")


def test_processors_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in (onednn.available() or "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in (onednn.available() or "")


def test_unknown_runtime(made: Path) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'onedn'"):
        dqtool.load(str(made / "exported"), "onedn")


@pytest.mark.parametrize("runtime", ["onednn", "simulate"])
def test_newer_format(chain: Path, runtime: str) -> None:
    manifest = next((chain / "exported").glob("dqtool.json"), None) or next((chain / "exported").glob("*.json"))
    note = json.loads(manifest.read_text())
    note["format"] = "dqtool/2"
    manifest.write_text(json.dumps(note))
    with pytest.raises(ArtifactError, match="newer"):
        dqtool.load(str(chain / "exported"), runtime)


def test_every_runtime_documents_itself() -> None:
    for name, runtime in runtimes.RUNTIMES.items():
        assert runtime.name == name
        assert runtime.summary and runtime.weights_in_memory
        assert {"available", "load"} <= set(runtime.engine().__all__)

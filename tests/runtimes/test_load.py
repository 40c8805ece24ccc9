"""`dqtool.load`: choosing a runtime, and what is said when one can't run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import dqtool
from dqtool import runtimes
from dqtool.artifacts import open_artifact
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.nn.integer import runs_as
from dqtool.runtimes import cpu


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
    assert "not cpu, this is a test" in said
    assert "runtime: simulate" in said
    assert network(torch.randn(1, 1, 8, 8), 0).sample.shape == (1, 1, 8, 8)


def test_a_runtime_that_cannot_run_here(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "available", lambda: "the processor lacks AVX2")
    with pytest.raises(EnvironmentFault, match="lacks AVX2"):
        dqtool.load(str(made / "exported"), "cpu")


def test_processors_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in (cpu.available() or "")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert "aarch64" in (cpu.available() or "")


def test_unknown_runtime(made: Path) -> None:
    with pytest.raises(UsageError, match="unknown runtime 'onedn'"):
        dqtool.load(str(made / "exported"), "onedn")


@pytest.mark.parametrize("runtime", ["cpu", "simulate"])
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


def test_a_missing_extra_is_named(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentFault, match=r"pip install \"dqtool\[openvino\]\"") as caught:
        dqtool.load(str(made / "exported"), "openvino")
    assert caught.value.exit_code == 4


def test_an_unsupported_layer_stays_float_and_is_named(made: Path, capsys: pytest.CaptureFixture) -> None:
    network = dqtool.load(str(made / "exported"), "simulate")
    layer = network.mid_block.resnets[0].conv1
    layer.padding = "same"  # stands for a convolution with another padding mode
    x = torch.randn(1, 1, 8, 8)
    expected = network(x, 0).sample
    engine = cpu.convert(network)
    engine.runtime = "cpu"
    assert runtimes.integer_report(engine)["mid_block.resnets.0.conv1"] == "float"
    assert (engine(x, 0).sample - expected).norm() < 0.1 * expected.norm()


def test_the_manifest_tells_what_runs_in_integers() -> None:
    assert runs_as("conv2d", 4, 4) == "int8"
    assert "inputs are not quantized" in runs_as("linear", 4, 16)
    assert "weights and inputs are not quantized" in runs_as("linear", 16, 16)
    assert runs_as("attention", 8, 4) == "int8"
    assert "not quantized" in runs_as("attention", 16, 16)


def test_reports_of_loaded_networks(made: Path) -> None:
    network = dqtool.load(str(made / "exported"), "cpu")
    names = {layer.name for layer in open_artifact(made / "exported").manifest.layers}
    assert set(runtimes.integer_report(network)) == names
    assert runtimes.integer_report(dqtool.load(str(made / "exported"), "simulate")) == {}

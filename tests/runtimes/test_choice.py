"""Choice of `auto`: the fastest runtime measured here at the nearest batch, else the default order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dqtool
from dqtool import runtimes
from dqtool.artifacts import Artifact, open_artifact
from dqtool.core import device as devices
from dqtool.runtimes import choice
from dqtool.runtimes.choice import AMX_ORDER, ORDER, recalled_timings, remember_timings, runtime_order


@pytest.fixture
def artifact(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    processor(tmp_path, monkeypatch, "avx2 avx512_vnni")
    return open_artifact(made / "exported")


def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str) -> None:
    """Make the machine report these instructions."""
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some\nflags\t\t: {flags}\n\n")
    monkeypatch.setattr(choice, "CPUINFO", tmp_path / "cpuinfo")


def test_without_measurements_the_usual_order(artifact: Artifact) -> None:
    assert runtime_order(artifact) == (list(ORDER), "by default")
    # Never one that does not compute the same integers; cuda comes first where there is a GPU.
    assert set(ORDER) == set(AMX_ORDER) == set(runtimes.RUNTIMES) - {"openvino-bf16", "cuda"}


def test_with_amx_another_order(artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(tmp_path, monkeypatch, "avx2 avx512_vnni amx_bf16 amx_int8 amx_tile")
    assert runtime_order(artifact) == (["openvino", "cpu", "simulate"], "by default")
    remember_timings(artifact, {1: {"cpu": 2.0, "simulate": 1.0}})
    assert runtime_order(artifact) == (["openvino", "simulate", "cpu"], "by default")
    remember_timings(artifact, {1: {"cpu": 0.5, "openvino": 3.0}})
    assert runtime_order(artifact)[0] == ["cpu", "simulate", "openvino"]


@pytest.mark.parametrize(("device", "order"), [("cuda", ["cuda", "simulate"]), ("mps", ["simulate"])])
def test_a_command_computes_on_the_device_that_it_was_given(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, device: str, order: list[str]
) -> None:
    monkeypatch.setattr(devices, "_chosen", torch.device(device))
    assert runtime_order(artifact) == (order, "by default")


def test_the_fastest_measured_at_the_nearest_batch_comes_first(artifact: Artifact) -> None:
    assert remember_timings(
        artifact, {1: {"cpu": 2.0, "openvino": 1.0, "fp32": 0.5}, 16: {"cpu": 3.0, "openvino": 4.0}}
    )
    assert remember_timings(artifact, {4: {"openvino": 3.0, "cpu": 2.0}})
    assert set(recalled_timings(artifact)) == {1, 4, 16}
    assert runtime_order(artifact)[0][:2] == ["openvino", "cpu"]
    assert runtime_order(artifact, 12)[0] == ["cpu", "openvino", "simulate"]
    remember_timings(artifact, {16: {"simulate": 9.0, "openvino": 2.0}})
    assert recalled_timings(artifact)[16] == {"cpu": 3.0, "openvino": 2.0, "simulate": 9.0}
    assert runtime_order(artifact, 12)[0] == ["openvino", "cpu", "simulate"]
    assert runtime_order(artifact, 2)[0][0] == "openvino"
    assert "batch 16" in runtime_order(artifact, 100)[1]


def test_one_runtime_alone_is_no_comparison(artifact: Artifact) -> None:
    assert not remember_timings(artifact, {1: {"cpu": 2.0, "fp32": 1.0}})
    assert recalled_timings(artifact) == {}


def test_another_number_of_threads_is_another_machine(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_timings(artifact, {1: {"cpu": 2.0, "openvino": 1.0}})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert recalled_timings(artifact) == {}


def test_a_damaged_or_unwritable_cache_is_done_without(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    remember_timings(artifact, {1: {"cpu": 2.0, "openvino": 1.0}})
    choice._file(artifact).write_text("{")
    assert runtime_order(artifact) == (list(ORDER), "by default")
    monkeypatch.setenv("DQTOOL_CACHE", "/proc/nowhere")
    assert not remember_timings(artifact, {1: {"cpu": 2.0, "openvino": 1.0}})


def test_auto_takes_it_and_says_why(artifact: Artifact, capsys: pytest.CaptureFixture) -> None:
    remember_timings(artifact, {1: {"cpu": 2.0, "simulate": 1.0}})
    network = dqtool.load(artifact.given, batch=1)
    assert network.runtime == "simulate"
    assert "the fastest that `dqtool bench` measured here at batch 1" in capsys.readouterr().err


def test_diffusers_follows_the_measurements(artifact: Artifact, capsys: pytest.CaptureFixture) -> None:
    from diffusers import DiffusionPipeline

    assert DiffusionPipeline.from_pretrained(str(artifact.path)).unet.runtime == "cpu"
    assert remember_timings(artifact, {1: {"cpu": 2.0, "simulate": 1.0, "openvino": 0.5}})
    capsys.readouterr()
    assert DiffusionPipeline.from_pretrained(str(artifact.path)).unet.runtime == "simulate"
    said = capsys.readouterr().err
    assert "runtime: simulate (float fake-quantization); openvino is faster, the fastest that `dqtool bench`" in said
    assert f"measured here at batch 1: dqtool.load('{artifact.path}', runtime='openvino')" in said
    assert remember_timings(artifact, {1: {"cpu": 0.2, "simulate": 1.0, "openvino": 0.5}})
    assert DiffusionPipeline.from_pretrained(str(artifact.path)).unet.runtime == "cpu"
    assert "runtime: cpu (int8 in eager PyTorch on x86 CPUs), the fastest" in capsys.readouterr().err

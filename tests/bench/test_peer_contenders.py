"""Other people's quantizers: what is missing is said with the command that installs it, and figures come from own processes."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run
from helpers import load_json, refused

from dqtool.artifacts import open_artifact
from dqtool.bench import peer_contenders, probe, sdcpp_contender
from dqtool.bench.alone import file_bytes
from dqtool.bench.contenders import CONTENDERS
from dqtool.bench.float_contenders import load_float
from dqtool.bench.peer_contenders import PACKAGES, load_onnxruntime, prepare_onnxruntime, require
from dqtool.bench.sdcpp_contender import read_log
from dqtool.errors import ArtifactError, EnvironmentFault
from dqtool.stages.bench import _subject
from dqtool.stages.options.bench import BenchOptions

LOG = """
[DEBUG] unet params backend buffer size =  1640.50 MB(RAM) (686 tensors)
[DEBUG] clip params backend buffer size =   235.00 MB(RAM) (196 tensors)
[DEBUG] unet compute buffer size: 359.50 MB(RAM)
[INFO ] sampling completed, taking 33.60s
[INFO ] decode_first_stage completed, taking 61.00s
"""


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_named_with_its_command(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peer_contenders, "find_spec", lambda _module: None)
    with pytest.raises(EnvironmentFault) as raised:
        require(name)
    assert raised.value.fix == f"pip install {PACKAGES[name][1]}"
    assert CONTENDERS[name].alone


def test_bench_says_what_is_missing_before_it_writes_anything(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peer_contenders, "find_spec", lambda _module: None)
    monkeypatch.setattr(sdcpp_contender.shutil, "which", lambda _command: None)
    refused(run, made, 4, "bench", "exported", "--against", "fp32,sdnq-int8")
    refused(run, made, 4, "bench", "exported", "--against", sdcpp_contender.NAME)


def test_the_log_of_stable_diffusion_cpp():
    assert read_log(LOG, 3) == (pytest.approx(11.2), 2000 << 20)
    with pytest.raises(EnvironmentFault, match="unknown model"):
        read_log("[ERROR] unknown model\n", 3)


def test_stable_diffusion_cpp_takes_no_other_network(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sdcpp_contender.shutil, "which", lambda _command: "/bin/true")
    subject = _subject(open_artifact(made / "exported"), BenchOptions(), str(tmp_path), 1)
    with pytest.raises(ArtifactError, match=r"1\.x"):
        sdcpp_contender.prepare_sdcpp(subject)


def test_onnxruntime_computes_nearly_what_the_float_network_does(made: Path, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    subject = _subject(open_artifact(made / "exported"), BenchOptions(), str(tmp_path), 1)
    prepare_onnxruntime(subject)
    arguments = subject.inputs(2)[0]
    expected, got = (load(subject).run(arguments) for load in (lambda s: load_float(s, "float32"), load_onnxruntime))
    assert got.shape == expected.shape
    assert (got - expected).norm() < 0.2 * expected.norm()
    size = file_bytes(peer_contenders.saved_file(subject, "onnxruntime-int8"))
    assert size is not None and size > 10_000
    assert [each.name for each in (tmp_path / "onnxruntime-int8").iterdir()] == ["model.onnx"]


def test_with_a_peer_every_contender_is_timed_in_a_process_of_its_own(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch
):
    """The peer's quantizer is replaced by nothing: the network stays float."""
    monkeypatch.setattr(probe, "_child", lambda request: (probe.answer(request, lambda: None), None))
    monkeypatch.setattr(peer_contenders, "require", lambda _name: None)
    monkeypatch.setitem(peer_contenders.QUANTIZERS, "sdnq-int8", lambda network, _inputs: network)
    monkeypatch.setitem(peer_contenders.PACKAGES, "sdnq-int8", ("torch", "sdnq"))
    monkeypatch.setitem(
        CONTENDERS, "sdnq-int8", CONTENDERS["sdnq-int8"].__class__(
            **{**CONTENDERS["sdnq-int8"].__dict__, "require": None, "libraries": ("torch", "diffusers")}
        ),
    )  # fmt: skip
    options = ("--runtime", "simulate", "--against", "fp32,sdnq-int8", "--batch", "1", "--seconds", "0", "--no-memory")
    report = load_json(run("bench", *options, "--json", cwd=made).stdout)
    assert {row["contender"] for row in report["speed"]["1"]} == {"simulate", "fp32", "fp32-channels-last"}
    rows = {row["contender"]: row for row in report["alone"]["1"]}
    assert set(rows) == {"simulate", "fp32", "fp32-channels-last", "sdnq-int8"}
    assert all(row["wall"] > 0 and row["processor"] > 0 and row["calls"] >= 3 for row in rows.values())
    assert rows["fp32"]["file_bytes"] > rows["simulate"]["file_bytes"]
    assert max(rows["fp32"]["ratio"], rows["fp32-channels-last"]["ratio"]) == 1
    shown = run("bench", *options, "--quiet", cwd=made).stdout
    assert "Each in a process of its own, batch 1" in shown


def test_a_file_with_what_lies_beside_it(tmp_path: Path):
    (tmp_path / "model.onnx").write_bytes(b"x" * 10)
    (tmp_path / "model.onnx.data").write_bytes(b"x" * 90)
    assert (file_bytes(tmp_path / "model.onnx"), file_bytes(tmp_path), file_bytes(tmp_path / "none" / "x")) == (
        100,
        100,
        None,
    )

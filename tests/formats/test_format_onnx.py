"""The ONNX export: it runs integer operators and follows the simulation at any batch, resolution and step."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import Run

import dqtool
from dqtool.formats import onnx as format_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def export(run: Run, made: Path, directory: Path, bits: str, kind: str = "onnx") -> None:
    """Write `dq` and `onnx` directories of the tiny model at `bits`, with initialised, untrained quantizers."""
    common = ("--iters", "0", "--refine-iters", "0", "-o", "d.safetensors")
    for arguments in (
        ("distill", str(made / "calibrated.safetensors"), "--bits", bits, *common),
        ("export", "d.safetensors", "-o", "dq"),
        ("export", "d.safetensors", "-o", "onnx", "--format", kind),
    ):
        result = run(*arguments, cwd=directory)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("bits", ["6/6", "8/8"])
def test_onnxruntime_follows_the_simulation(made: Path, tmp_path: Path, run: Run, bits: str) -> None:
    export(run, made, tmp_path, bits)
    path = tmp_path / "onnx" / "unet" / "model.onnx"
    options = onnxruntime.SessionOptions()
    # Without VNNI ONNX Runtime's int8 products overflow 16 bits unless this setting selects the slower ones.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options)
    simulated = dqtool.load(str(tmp_path / "dq"), "simulate")
    steps = simulated.timesteps
    for shape, timestep in (((1, 1, 8, 8), steps[:1]), ((2, 1, 12, 16), steps[2:3]), ((2, 1, 8, 8), steps[[3, 1]])):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        expected = simulated(x, timestep.expand(len(x))).sample
        got = torch.from_numpy(session.run(None, {"sample": x.numpy(), "timestep": timestep.numpy()})[0])
        assert got.shape == expected.shape
        assert (got - expected).norm() < 0.1 * expected.norm()  # a code on a rounding tie may fall either way
    layers = json.loads((tmp_path / "onnx" / "dqtool.json").read_text())["layers"]
    assert {layer["runs"] for layer in layers} == {"int8"}
    kinds = Counter(layer["kind"] for layer in layers)
    operators = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert operators["ConvInteger"] == kinds["conv2d"]
    assert operators["MatMulInteger"] == kinds["linear"] + 2 * kinds["attention"]
    assert operators["Conv"] == operators["MatMul"] == operators["Gemm"] == 0


@pytest.mark.parametrize("bits", ["4/4", "8/8"])
def test_nodes_of_constant_scale_follow_the_simulation(made: Path, tmp_path: Path, run: Run, bits: str) -> None:
    export(run, made, tmp_path, bits, "onnx-qdq")
    path = tmp_path / "onnx" / "unet" / "model.onnx"
    simulated = dqtool.load(str(tmp_path / "dq"), "simulate")
    session = onnxruntime.InferenceSession(str(path))
    x, steps = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), simulated.timesteps[[3, 1]]
    got = torch.from_numpy(session.run(None, {"sample": x.numpy(), "timestep": steps.numpy()})[0])
    expected = simulated(x, steps).sample
    assert (got - expected).norm() < 0.1 * expected.norm()
    graph = onnx.load(path).graph
    constants = {each.name for each in graph.initializer} | {n.output[0] for n in graph.node if n.op_type == "Constant"}
    nodes = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert nodes and all(node.input[1] in constants for node in nodes)  # the step is in the multiplier before them
    made_by = {name: node.op_type for node in graph.node for name in node.output}
    for node in graph.node:
        if node.op_type == "Conv":
            assert [made_by[name] for name in node.input[:2]] == ["DequantizeLinear"] * 2


def test_large_graphs_keep_their_weights_in_a_second_file(
    made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(format_onnx, "LARGEST", 1000)
    result = run("export", str(made / "distilled.safetensors"), "-o", "onnx", "--format", "onnx", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "onnx" / "dqtool.json").read_text())
    assert {"unet/model.onnx", "unet/model.onnx_data"} <= set(manifest["files"])
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "unet" / "model.onnx"))
    assert session.run(None, {"sample": torch.randn(1, 1, 8, 8).numpy(), "timestep": torch.zeros(1).numpy()})


def test_without_the_extra(made: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run("export", str(made / "distilled.safetensors"), "-o", "onnx", "--format", "onnx", cwd=tmp_path)
    assert result.returncode == 4
    assert 'pip install "dqtool[onnx]"' in result.stderr

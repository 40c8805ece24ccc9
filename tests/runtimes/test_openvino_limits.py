"""Graphs from strangers: one that repeats, and one that grows small constants, are refused before they are compiled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from synthetic import synthetic_network

from dqtool.errors import ArtifactError
from dqtool.models.families import FAMILIES
from dqtool.models.sources.resolve import resolve_model
from dqtool.runtimes.openvino_limits import check_graph

openvino = pytest.importorskip("openvino")

from families import component_directory  # noqa: E402
from openvino import opset13 as ops  # noqa: E402

from dqtool.formats.openvino import build_ir, save_ir, shrink_weights  # noqa: E402


def read_back(model: object, folder: Path) -> tuple[object, int]:
    """Return a graph as its file holds it, and the bytes of its constants."""
    openvino.save_model(model, folder / "graph.xml", compress_to_fp16=False)
    return openvino.Core().read_model(folder / "graph.xml"), (folder / "graph.bin").stat().st_size


def test_a_loop_is_refused(tmp_path: Path) -> None:
    inside = ops.parameter([1], np.float32)
    body = openvino.Model([ops.add(inside, np.float32([1.0])), ops.constant(np.array([True]))], [inside], "body")
    sample = ops.parameter([1], np.float32, name="sample")
    loop = ops.loop(ops.constant(np.int64(10**15)), ops.constant(np.array(True)))
    loop.set_function(body)
    loop.set_special_body_ports([-1, 1])
    loop.set_merged_input(inside, sample.output(0), body.get_results()[0].output(0))
    ended = loop.get_iter_value(body.get_results()[0].output(0), -1)
    graph, weights = read_back(openvino.Model([ended], [sample]), tmp_path)
    with pytest.raises(ArtifactError, match="an operation Loop, which no exported network needs"):
        check_graph(graph, weights, "graph.xml")


def test_a_small_constant_that_becomes_a_huge_one_is_refused(tmp_path: Path) -> None:
    sample = ops.parameter([1], np.float32, name="sample")
    huge = ops.broadcast(ops.constant(np.float32([1.0])), ops.constant(np.int64([1 << 30])))
    total = ops.reduce_sum(huge, ops.constant(np.int64([0])), keep_dims=True)
    graph, weights = read_back(openvino.Model([ops.add(sample, total)], [sample]), tmp_path)
    with pytest.raises(ArtifactError, match="computes 4,294,967,296 bytes from constants of .* an operation Broadcast"):
        check_graph(graph, weights, "graph.xml")


def test_exported_networks_pass(tmp_path: Path) -> None:
    path = component_directory("sdxl", tmp_path / "sdxl")
    source = resolve_model(str(path))
    family = FAMILIES[source.class_name]
    model = build_ir(synthetic_network(str(path), "2/6"), family, family.example(source.config), saturating=True)
    shrink_weights(model)
    save_ir(model, tmp_path / "openvino_model.xml")
    graph = openvino.Core().read_model(tmp_path / "openvino_model.xml")
    check_graph(graph, (tmp_path / "openvino_model.bin").stat().st_size, "openvino_model.xml")

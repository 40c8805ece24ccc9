"""The network of an artifact is recorded at most once, however many parts of `distill` ask for its recorded_graph."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqtool.artifacts import read_manifest
from dqtool.graph import network as graph_module
from dqtool.models.networks import recorded_graph
from dqtool.models.networks.recorded_graph import graph_of
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.shared.settings import RunSettings


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Networks that were recorded while the test ran."""
    recorded_graph._graph.cache_clear()
    seen: list[object] = []
    plain = graph_module.record

    def counted(model, *arguments):
        seen.append(model)
        return plain(model, *arguments)

    monkeypatch.setattr(graph_module, "record", counted)
    return seen


def test_a_preset_a_method_by_roles_and_folding_share_one_recording(
    made: Path, tmp_path: Path, recordings: list[object]
) -> None:
    options = DistillOptions(
        str(made / "calibrated.safetensors"), str(tmp_path / "d.safetensors"), method="per-step", iters=2,
        preset="nonstandard",
    )  # fmt: skip
    distill(options, RunSettings(quiet=True))
    assert len(recordings) == 1


def test_an_artifacts_structure_is_that_of_its_manifest(made: Path, recordings: list[object]) -> None:
    manifest = read_manifest(str(made / "calibrated.safetensors"))
    graph = graph_of(manifest)
    assert graph_of(manifest) is graph
    assert [info.name for info in graph.trace.layers] == [layer.name for layer in manifest.layers]
    assert [(block.name, sorted(block.reads)) for block in graph.trace.blocks] == [
        (block["name"], block["reads"]) for block in manifest.metrics.as_read["blocks"]
    ]
    assert len(recordings) == 1

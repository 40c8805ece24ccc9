"""Exports of architectures with random weights: they run like any export, and are made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import NETWORK, SCHEDULER

import dqtool
from dqtool.artifacts import open_artifact
from dqtool.bench.random_export import random_export
from dqtool.core.quantization import QuantizationSpec
from dqtool.errors import UsageError
from dqtool.models import architectures
from dqtool.models.architectures import Architecture

TINY = Architecture(
    "tiny",
    "tiny",
    "UNet2DModel",
    {**NETWORK, "block_out_channels": [8, 16]},
    43_000,
    6,
    scheduler={**SCHEDULER, "_class_name": "DDIMScheduler"},
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Architecture:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(architectures.ARCHITECTURES, "tiny", TINY)
    return TINY


@pytest.mark.parametrize("bits", ["4/4", "8/8"])
def test_the_export_runs_and_is_cached(tiny: Architecture, bits: str):
    path = random_export("tiny", QuantizationSpec.parse(bits))
    artifact = open_artifact(path, ["export"])
    layers = {layer.name: layer for layer in artifact.manifest.layers}
    assert layers["conv_in"].bits == (8, 8)
    assert layers["mid_block.resnets.0.conv1"].bits == tuple(int(b) for b in bits.split("/"))
    assert any(layer.dilated for layer in layers.values())
    network = dqtool.load(path, runtime="simulate")
    assert len(network.timesteps) == tiny.steps
    with torch.no_grad():
        output = network(torch.randn(2, 1, 8, 8), network.timesteps[1], return_dict=False)[0]
    assert output.isfinite().all()
    stamp = (Path(path) / "dqtool.json").stat().st_mtime_ns
    assert random_export("tiny", QuantizationSpec.parse(bits)) == path
    assert (Path(path) / "dqtool.json").stat().st_mtime_ns == stamp


def test_an_unknown_architecture_is_refused():
    with pytest.raises(UsageError, match="ddpm-cifar10"):
        random_export("unknown", QuantizationSpec.parse("4/4"))

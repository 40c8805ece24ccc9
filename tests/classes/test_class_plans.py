"""Plans of networks without an adapter: counted on shapes from the model's files, as the run itself counts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from class_table import dilate_options
from denoisers import build_denoiser

from dqtool.artifacts import open_artifact
from dqtool.stages.dilate import dilate
from dqtool.stages.planning.estimate import estimate, network_size
from dqtool.stages.planning.network import PlannedNetwork
from dqtool.stages.shared.settings import RunSettings


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "PriorTransformer"])
def test_a_plan_counts_what_dilate_records(name: str, tmp_path: Path) -> None:
    options = dilate_options(name, build_denoiser(name), tmp_path)
    network = PlannedNetwork.of(options)
    layers = open_artifact(dilate(options, RunSettings(quiet=True))).manifest.layers
    assert network_size(network) == (sum(layer.macs for layer in layers), len(layers))
    assert network.activations is not None and network.activations.forward > 0
    assert (network.calls_per_step(None), network.calls_per_step(5.0)) == (1, 2)


def test_a_network_that_looks_at_values_has_no_estimate(tmp_path: Path) -> None:
    name = "OmniGenTransformer2DModel"
    options = dilate_options(name, build_denoiser(name), tmp_path)
    assert not PlannedNetwork.of(options).runs_on_shapes
    dilated = {"model": options.model, "family": "generic", "example": options.example, "scheduler": options.scheduler}
    stages = {"dilate": dilated, "calibrate": {}, "distill": {}, "eval": {}}
    found = estimate(stages, (), "cpu", 0)
    assert found == {"time": f"unknown, since {name} does not run on shapes alone, as a plan needs"}

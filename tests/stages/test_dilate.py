"""Dilation of a whole network: the output stays, the ranges stay, the manifest says what was done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import NETWORK

from dqtool.artifacts import Artifact, open_artifact
from dqtool.models.sources.resolve import resolve_model
from dqtool.scaling.methods import METHODS
from dqtool.scaling.verifying import TOLERANCE
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.shared.artifact_models import split_dilated, teacher_of
from dqtool.stages.shared.settings import RunSettings


@pytest.fixture(scope="module")
def widened(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The tiny model after Weight Dilation."""
    output = str(tmp_path_factory.mktemp("wd") / "dilated.safetensors")
    return open_artifact(dilate(DilateOptions(str(made / "tiny"), output, scaling="wd"), RunSettings(quiet=True)))


def test_output_is_unchanged_and_the_manifest_reports_it(widened: Artifact) -> None:
    manifest = widened.manifest
    assert manifest.metrics.as_read["equivalence_error"] <= TOLERANCE
    assert 0 < manifest.metrics.as_read["unsaturated_share"] < 1
    assert 0 < manifest.metrics.as_read["mean_inverse"] < 1
    scaled = [layer for layer in manifest.layers if layer.scaling is not None]
    assert scaled
    assert all(layer.scaling.max >= 1 for layer in scaled)


def test_every_out_channel_keeps_its_range(made: Path, widened: Artifact) -> None:
    from dqtool.models.networks.loading import load_weights

    original = load_weights(resolve_model(str(made / "tiny")))
    state, dilation = split_dilated(widened.tensors())
    assert dilation
    for name in dilation:
        before, after = original[f"{name}.weight"].flatten(1), state[f"{name}.weight"].flatten(1)
        assert torch.equal(before.amin(1).clamp(max=0), after.amin(1).clamp(max=0))
        assert torch.equal(before.amax(1).clamp(min=0), after.amax(1).clamp(min=0))


def test_the_teacher_comes_back_to_one_unit_in_the_last_place(made: Path, widened: Artifact) -> None:
    from dqtool.models.networks.loading import build_network, load_weights

    source = resolve_model(str(made / "tiny"))
    artifact = widened
    original = build_network(source.class_name, source.config, load_weights(source), source.given)
    teacher = teacher_of(artifact.manifest, artifact.tensors())
    for name, value in original.state_dict().items():
        torch.testing.assert_close(teacher.state_dict()[name], value, rtol=3e-7, atol=0)


def test_layers_that_share_an_input_share_their_factors() -> None:
    from torch import nn

    from dqtool.graph.trace import LayerInfo
    from dqtool.scaling.choosing import choose_by_weights
    from dqtool.scaling.groups import scaling_groups

    torch.manual_seed(0)
    names = ["to_q", "to_k", "to_v", "to_out"]
    # Few rows, so that most channels are far from every bound and the minimum over q, k, v is not trivially 1.
    network = nn.ModuleDict({name: nn.Linear(16, 2) for name in names})
    layers = [LayerInfo(n, "linear", (2, 16), 32, shares="to_q" if n[-1] in "kv" else None) for n in names]
    chosen = choose_by_weights(network, layers, METHODS["wd"])
    assert {owner: len(members) for owner, members in scaling_groups(layers).items()} == {"to_q": 3, "to_out": 1}
    assert bool((chosen["to_q"].scale > 1).any())
    assert not torch.equal(chosen["to_q"].scale, chosen["to_out"].scale)


def test_component_directories_and_bare_files_are_models_too(made: Path, tmp_path: Path) -> None:
    expected = open_artifact(made / "dilated.safetensors")
    component = made / "tiny" / "unet"
    for number, given in enumerate((component, component / "diffusion_pytorch_model.safetensors")):
        output = dilate(DilateOptions(str(given), str(tmp_path / f"{number}.safetensors")), RunSettings(quiet=True))
        artifact = open_artifact(output)
        assert artifact.sha256 == expected.sha256
        assert artifact.manifest.pipeline is None
        assert artifact.manifest.network.config["sample_size"] == NETWORK["sample_size"]

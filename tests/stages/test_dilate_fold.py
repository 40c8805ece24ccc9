"""Factors in producers instead of quantizers: `dilate --fold` before calibration, `distill` after training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import NETWORK, load_json, rewrite_weights, tiny_pipeline, weights_of
from safetensors.torch import load_file
from torch import nn

import dqtool
from dqtool.artifacts import Artifact, open_artifact
from dqtool.models.networks.packed import packed_network, plans_of
from dqtool.scaling.verifying import TOLERANCE
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.inspect import describe, render
from dqtool.stages.shared.artifact_models import teacher_of
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)


def loose_pipeline(path: Path) -> Path:
    """A tiny pipeline whose attention has unsaturated channels (8 of 16 columns shrunk) and norms with an affine."""
    tiny_pipeline(path)
    changes = {}
    for name, value in load_file(weights_of(path)).items():
        if ".attentions." in name and value.dim() == 2:
            shrunk = value.clone()
            shrunk[:, ::2] *= torch.linspace(0.1, 0.9, len(shrunk[0, ::2]))
            changes[name] = shrunk
        elif "group_norm" in name:
            changes[name] = torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) * 0.3 + 1
    rewrite_weights(path, changes)
    return path


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, and `dilated`, `calibrated`, `distilled` without and with `--fold` (directories `plain` and `folded`)."""
    root = tmp_path_factory.mktemp("fold")
    model = str(loose_pipeline(root / "model"))
    for name in ("plain", "folded"):
        at = root / name
        at.mkdir()
        first = dilate(
            DilateOptions(model, str(at / "dilated.safetensors"), scaling="wd", fold=name == "folded"), QUIET
        )
        options = CalibrateOptions(first, str(at / "calibrated.safetensors"), steps=4, samples=16, scaling="keep")
        second = calibrate(options, QUIET)
        third = distill(
            DistillOptions(second, str(at / "distilled.safetensors"), bits="6/6", iters=3, refine_iters=0), QUIET
        )
        export(ExportOptions(third, str(at / "exported")), QUIET)
    return root


def opened(path: Path) -> Artifact:
    return open_artifact(str(path))


def homes(artifact: Artifact) -> dict[str, list[str]]:
    """Scaled layers, and what their factors were folded into (empty: nothing)."""
    return {
        layer.name: layer.scaling.folded_into or [] for layer in artifact.manifest.layers if layer.scaling is not None
    }


def test_dilate_leaves_producers_alone_unless_told(loose: Path) -> None:
    artifact = opened(loose / "plain" / "dilated.safetensors")
    tensors, original = artifact.tensors(), load_file(weights_of(loose / "model"))
    assert not any(homes(artifact).values())
    assert {name for name in tensors if name.endswith(".dilation")} == {f"{name}.dilation" for name in homes(artifact)}
    for name, value in original.items():
        if name.removesuffix(".weight") not in homes(artifact):
            assert torch.equal(tensors[name], value), name


def test_folding_moves_what_it_can_and_says_where(loose: Path) -> None:
    artifact = opened(loose / "folded" / "dilated.safetensors")
    where, tensors = homes(artifact), artifact.tensors()
    assert set(where) == set(homes(opened(loose / "plain" / "dilated.safetensors")))
    for name, into in where.items():
        attention = name.split(".to_")[0]
        if "to_out" in name:
            assert into == [f"{attention}.to_v"]
        elif "attentions" in name:
            assert into == [f"{attention}.group_norm"]
        else:  # SiLU, or a tensor with other readers, lies before
            assert into == []
        assert (f"{name}.dilation" in tensors) == (not into)
    assert sum(map(bool, where.values())) >= 8
    assert artifact.manifest.parameters.as_read["fold"] is True
    assert artifact.manifest.metrics.as_read["equivalence_error"] <= TOLERANCE


def test_a_fully_foldable_model_becomes_a_plain_checkpoint(tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    model = loose_pipeline(tmp_path / "model")
    # Every weight outside of attention at its row's bound: nothing there can be dilated.
    state = load_file(weights_of(model))
    flat = {
        name: value.sign().add(0.5).sign() * 0.1
        for name, value in state.items()
        if value.dim() > 1 and "attentions" not in name
    }
    rewrite_weights(model, flat)
    output = dilate(DilateOptions(str(model), str(tmp_path / "plain.safetensors"), scaling="wd", fold=True), QUIET)
    assert all(homes(opened(Path(output))).values())
    plain = load_file(output)
    original = UNet2DModel.from_pretrained(str(model / "unet"))
    assert set(plain) == set(original.state_dict())
    assert any(not torch.equal(plain[name], value) for name, value in original.state_dict().items())
    network = UNet2DModel(**NETWORK)
    network.load_state_dict(plain)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        expected, got = (each.eval()(x, t, return_dict=False)[0] for each in (original, network))
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_the_teacher_of_a_folded_artifact_is_the_original(loose: Path) -> None:
    from diffusers import UNet2DModel

    artifact = opened(loose / "folded" / "dilated.safetensors")
    original = UNet2DModel.from_pretrained(str(loose / "model" / "unet")).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 500])
    with torch.no_grad():
        teacher = teacher_of(artifact.manifest, artifact.tensors())
        expected, got = (each(x, t, return_dict=False)[0] for each in (original, teacher))
    assert (got - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_distill_folds_what_crosses_no_quantizer(loose: Path) -> None:
    distilled = opened(loose / "plain" / "distilled.safetensors")
    tensors, where = distilled.tensors(), homes(distilled)
    assert any(where.values())
    for layer in distilled.manifest.layers:
        name = layer.name
        if name in where:
            folded = ".to_q" in name or ".to_k" in name or ".to_v" in name
            assert bool(where[name]) == folded, name
            assert (f"{name}.dilation" in tensors) == layer.dilated == (not folded)


def test_folding_after_training_changes_rounding_only(
    loose: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("dqtool.scaling.folding.pending_folds", lambda *_: [])
    options = DistillOptions(
        str(loose / "plain" / "calibrated.safetensors"), str(tmp_path / "d.safetensors"), "6/6", iters=3, refine_iters=0
    )
    apart = opened(Path(distill(options, QUIET)))
    folded = opened(loose / "plain" / "distilled.safetensors")
    assert not any(homes(apart).values())
    before, after = apart.tensors(), folded.tensors()
    assert all(torch.equal(before[name], value) for name, value in after.items() if "packed" in name)
    x, t = torch.randn(8, 1, 8, 8), opened(loose / "plain" / "calibrated.safetensors").tensors()["timesteps"][2]
    with torch.no_grad():
        first, second = (network_of(each)(x, t, return_dict=False)[0] for each in (apart, folded))
    error = (first - second).square().mean() / first.square().mean()
    assert error < 1e-4  # a code here and there that lay on a rounding threshold


@pytest.mark.parametrize("variant", ["plain", "folded"])
def test_what_was_distilled_is_what_is_exported_bit_for_bit(loose: Path, variant: str) -> None:
    distilled = opened(loose / variant / "distilled.safetensors")
    exported = dqtool.load(str(loose / variant / "exported"), runtime="simulate")
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for t in distilled.tensors()["timesteps"]:
            expected, got = (each(x, t, return_dict=False)[0] for each in (network_of(distilled), exported))
            assert torch.equal(expected, got)


def test_inspect_says_where_each_factor_lives(loose: Path) -> None:
    for stage in ("dilated.safetensors", "distilled.safetensors", "exported"):
        description = describe(str(loose / "folded" / stage))
        text = render(description)
        (row,) = [line for line in text if line.startswith("mid_block.attentions.0.to_q ")]
        assert " mid_block.attentions.0.group_norm" in row, row
        (row,) = [line for line in text if line.startswith("mid_block.resnets.0.conv1 ")]
        assert " quantizer" in row, row
        folded = sum(map(bool, homes(opened(loose / "folded" / stage)).values()))
        assert any(f"folded into producers for {folded} layers" in line for line in text)


def test_the_dry_run_foresees_the_folds(loose: Path, run: Run, tmp_path: Path) -> None:
    calibrated = str(loose / "plain" / "calibrated.safetensors")
    result = run("distill", calibrated, "--bits", "6/6", "--iters", "3", "--dry-run", "--json", cwd=tmp_path)
    foreseen = load_json(result.stdout)["work"]["bytes"]
    assert foreseen == opened(loose / "plain" / "exported").manifest.metrics.as_read["bytes"]


def network_of(artifact: Artifact) -> nn.Module:
    manifest = artifact.manifest
    return packed_network(manifest.network.class_name, manifest.network.config, plans_of(manifest), artifact.tensors())

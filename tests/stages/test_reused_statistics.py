"""`calibrate --statistics`: a finetune takes the samples, statistics and factors of the model that it was trained from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_dilate_fold import loose_pipeline

from dqtool.artifacts import Artifact, open_artifact
from dqtool.errors import ArtifactError, UsageError
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.shared.artifact_models import teacher_of
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)
CHANGE = 0.01
"""Relative change of every weight between the model and its finetune."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` and `finetune`, both dilated."""
    from helpers import rewrite_weights, weights_of

    root = tmp_path_factory.mktemp("reused")
    loose_pipeline(root / "model")
    shutil.copytree(root / "model", root / "finetune")
    generator = torch.Generator().manual_seed(5)
    weights = load_file(weights_of(root / "finetune"))
    rewrite_weights(
        root / "finetune",
        {name: value * (1 + CHANGE * torch.randn(value.shape, generator=generator)) for name, value in weights.items()},
    )
    for name in ("model", "finetune"):
        dilate(DilateOptions(str(root / name), str(root / f"{name}-d.safetensors")), QUIET)
    return root


def calibrated(root: Path, name: str, scaling: str) -> str:
    options = {"steps": 4, "samples": 64, "scaling": scaling}
    return calibrate(
        CalibrateOptions(str(root / f"{name}-d.safetensors"), str(root / f"{name}-{scaling}.safetensors"), **options),  # type: ignore[arg-type]
        QUIET,
    )


def reused(root: Path, name: str, base: str) -> Artifact:
    options = CalibrateOptions(
        str(root / f"{name}-d.safetensors"), str(root / f"{name}-reused-{Path(base).name}"), statistics=base
    )
    return open_artifact(calibrate(options, QUIET))


@pytest.mark.parametrize("scaling", ["keep", "auto", "osplus", "rotation", "none"])
def test_the_finetune_computes_as_before_on_the_factors_of_the_model(root: Path, scaling: str) -> None:
    base = open_artifact(calibrated(root, "model", scaling))
    found = reused(root, "finetune", str(root / f"model-{scaling}.safetensors"))
    theirs, mine = base.tensors(), found.tensors()
    shifted = any(layer.scaling and layer.scaling.shifted_in for layer in base.manifest.layers)
    assert shifted == (scaling == "osplus") or scaling == "auto"
    for name, value in theirs.items():
        if name.endswith((".dilation", ".histogram", ".range", ".channel_range", "timesteps")) or "trajectory." in name:
            assert torch.equal(mine[name], value), name
    assert found.manifest.layers == base.manifest.layers
    assert found.manifest.sampling == base.manifest.sampling
    assert found.manifest.network.source.endswith("finetune")
    assert found.manifest.metrics.as_read["equivalence_error"] < 1e-5
    if not shifted:  # biases hold a shift; the check above is of the whole network then
        original = load_file(root / "finetune" / "unet" / "diffusion_pytorch_model.safetensors")
        teacher = teacher_of(found.manifest, mine).state_dict()
        for name, value in original.items():
            torch.testing.assert_close(teacher[name], value, rtol=1e-5, atol=1e-6)


def test_a_model_takes_its_own_calibration_over_unchanged(root: Path) -> None:
    base = calibrated(root, "model", "auto")
    theirs, mine = open_artifact(base).tensors(), reused(root, "model", base).tensors()
    assert theirs.keys() == mine.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-5, atol=1e-6)


def test_the_quality_is_near_that_of_an_own_calibration(root: Path) -> None:
    figures = {}
    reused(root, "finetune", calibrated(root, "model", "auto"))
    for name, artifact in {
        "reused": str(root / "finetune-reused-model-auto.safetensors"),
        "own": calibrated(root, "finetune", "auto"),
    }.items():
        quantized = distill(DistillOptions(artifact, str(root / f"{name}-q"), bits="8/8", iters=0), QUIET)
        report = evaluate(EvalOptions(quantized, str(root / f"{name}.json"), samples=8, metrics=("similarity",)), QUIET)
        figures[name] = open_artifact(report).manifest.metrics.as_read["psnr"]["mean"]
    assert figures["reused"] > figures["own"] - 3, figures


def test_statistics_of_another_kind_of_model_are_refused(root: Path, tmp_path: Path) -> None:
    base = calibrated(root, "model", "keep")
    shutil.copytree(root / "finetune", tmp_path / "v")
    place = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"prediction_type": "v_prediction"}))
    from helpers import tiny_pipeline

    tiny_pipeline(tmp_path / "wide", block_out_channels=(8, 24))
    for name, message in (("v", "scheduler prediction_type is epsilon"), ("wide", "config block_out_channels")):
        dilate(DilateOptions(str(tmp_path / name), str(tmp_path / f"{name}-d.safetensors")), QUIET)
        with pytest.raises(ArtifactError, match=message):
            reused(tmp_path, name, base)
        assert not list(tmp_path.glob("*reused*"))
    dilate(DilateOptions(str(root / "finetune"), str(tmp_path / "folded-d.safetensors"), fold=True), QUIET)
    with pytest.raises(ArtifactError, match="without --fold"):
        reused(tmp_path, "folded", base)
    with pytest.raises(UsageError, match=r"--steps, --seed beside --statistics"):
        calibrate(CalibrateOptions(str(root / "finetune-d.safetensors"), steps=9, seed=3, statistics=base), QUIET)

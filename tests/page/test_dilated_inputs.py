"""Inputs before dilation: the network runs on calibration points with their own conditions."""

from __future__ import annotations

from pathlib import Path

import torch
from families import dit_pipeline

from dqtool.artifacts import open_artifact
from dqtool.page.dilated_inputs import dilated_inputs
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.shared.artifact_models import teacher_of
from dqtool.stages.shared.settings import RunSettings


def test_inputs_before_dilation_are_those_of_the_points_conditions(tmp_path: Path) -> None:
    """Measured values times the factors equal those of the calibration, with more points than conditions, and guidance."""
    quiet = RunSettings(quiet=True)
    dilated, calibrated = str(tmp_path / "dilated.safetensors"), str(tmp_path / "calibrated.safetensors")
    dilate(DilateOptions(str(dit_pipeline(tmp_path / "model")), dilated, scaling="wd"), quiet)
    calibrate(
        CalibrateOptions(dilated, calibrated, steps=2, samples=48, batch_size=8, guidance=1.5, scaling="keep"), quiet
    )
    artifact = open_artifact(calibrated)
    tensors = artifact.tensors()
    assert len(tensors["trajectory.x"]) > max(len(v) for k, v in tensors.items() if k.startswith("condition."))
    found = dilated_inputs(artifact, lambda: teacher_of(artifact.manifest, tensors), per_step=24)
    assert found
    for entry in found:
        scale = tensors[f"{entry.name}.dilation"]
        for before, after in zip(entry.range_before, entry.range_after, strict=True):
            # Channels are divided by factors of at least 1, so the range shrinks, but at most by the largest factor.
            widest, narrowed = max(map(abs, before)), max(map(abs, after))
            assert widest / float(scale.max()) - 1e-5 <= narrowed <= widest + 1e-5
    assert torch.isfinite(torch.tensor([e.range_before for e in found])).all()

"""Samplers of every kind through all stages: each call finds the row of its own step, and 8/8 stays near full precision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import dit_pipeline, text_pipeline
from helpers import tiny_pipeline

from dqtool.artifacts import open_artifact
from dqtool.errors import UsageError
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.dilate import DilateOptions, dilate
from dqtool.stages.distill import DistillOptions, distill
from dqtool.stages.eval import EvalOptions, evaluate
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.sample import SampleOptions, sample
from dqtool.stages.shared.settings import RunSettings

QUIET = RunSettings(quiet=True)
BETAS = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
CONSISTENCY = {"_class_name": "CMStochasticIterativeScheduler"}
SAMPLERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{f"consistency-{n}": (CONSISTENCY, {"steps": n}) for n in (1, 2, 4, 8)},
    "consistency-listed": (CONSISTENCY, {"timesteps": "22,0"}),
    "edm": ({"_class_name": "EDMEulerScheduler"}, {"steps": 3}),
    "edm-dpm": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, {"steps": 3}),
    "karras": ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, **BETAS}, {"steps": 3}),
    "karras-dpm": ({"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, **BETAS}, {"steps": 3}),
    "heun": ({"_class_name": "HeunDiscreteScheduler", **BETAS}, {"steps": 3}),
    "ancestral": ({"_class_name": "EulerAncestralDiscreteScheduler", **BETAS}, {"steps": 3}),
    "ddpm": ({"_class_name": "DDPMScheduler", **BETAS}, {"steps": 3}),
    "lcm": ({"_class_name": "LCMScheduler", **BETAS}, {"steps": 2}),
    "lcm-by-name": ({"_class_name": "DDIMScheduler", **BETAS}, {"steps": 1, "sampler": "lcm"}),
    "tcd": ({"_class_name": "TCDScheduler", **BETAS}, {"steps": 2}),
    "unipc": ({"_class_name": "UniPCMultistepScheduler", **BETAS}, {"steps": 3}),
    "quad": ({"_class_name": "DDIMScheduler", **BETAS}, {"steps": 4, "spacing": "quad", "clip": False, "eta": 0.5}),
    "listed": ({"_class_name": "DDPMScheduler", **BETAS}, {"timesteps": "900,400,30"}),
}


def chain(root: Path, model: Path, options: dict[str, Any], scheduler: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run all five stages and `sample`; return the sampling that calibration recorded, and the figures of `eval`."""
    at = {stage: str(root / stage) for stage in ("dilated", "calibrated", "distilled", "exported", "report.json")}
    told = None
    if scheduler is not None:
        told = str(root / "scheduler.json")
        Path(told).write_text(json.dumps(scheduler))
    dilate(DilateOptions(str(model), at["dilated"], scaling="wd", scheduler=told), QUIET)
    calibrate(CalibrateOptions(at["dilated"], at["calibrated"], samples=16, batch_size=4, **options), QUIET)
    distill(DistillOptions(at["calibrated"], at["distilled"], bits="8/8", iters=1, refine_iters=1), QUIET)
    export(ExportOptions(at["distilled"], at["exported"]), QUIET)
    sample(SampleOptions(at["exported"], 1, str(root / "s.png")), QUIET)
    evaluate(EvalOptions(at["exported"], at["report.json"], samples=2, metrics=("similarity",)), QUIET)
    sampling = open_artifact(at["exported"]).manifest.sampling.as_read
    return sampling | {"figures": open_artifact(at["report.json"]).manifest.metrics.as_read}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_goes_through_all_stages(tmp_path: Path, kind: str) -> None:
    scheduler, options = SAMPLERS[kind]
    found = chain(tmp_path, tiny_pipeline(tmp_path / "model"), options, scheduler)
    assert found["figures"]["missed_timesteps"] == []
    assert found["figures"]["psnr"]["mean"] > 15
    tensors = open_artifact(tmp_path / "calibrated").tensors()
    if kind.startswith("consistency-") and "steps" in options:
        assert len(tensors["timesteps"]) == options["steps"]
    if kind == "quad":
        assert (found["timesteps"], found["spacing"]) == ([800.0, 355.0, 88.0, 0.0], "quad")
        assert found["scheduler"]["clip_sample"] is False
    if kind == "listed":
        assert tensors["timesteps"].tolist() == [900, 400, 30]
        assert found["steps"] == 3


def test_ancestral_sampling_with_a_learned_variance(tmp_path: Path) -> None:
    """DiT's own protocol."""
    options = {"steps": 3, "sampler": "ddpm", "variance": "learned_range"}
    found = chain(tmp_path, dit_pipeline(tmp_path / "model"), options)
    assert found["scheduler"]["variance_type"] == "learned_range"
    assert found["figures"]["missed_timesteps"] == []
    assert found["figures"]["psnr"]["mean"] > 15


def test_flux_is_calibrated_at_listed_timesteps(tmp_path: Path) -> None:
    """Its schedule is shifted by the number of tokens, and a list replaces the shifted timesteps."""
    at = dilate(DilateOptions(str(text_pipeline("flux", tmp_path / "model")), str(tmp_path / "d"), scaling="wd"), QUIET)
    options = CalibrateOptions(at, str(tmp_path / "c"), scaling="keep", samples=6, timesteps="1000,600,200")
    found = open_artifact(calibrate(options, QUIET))
    assert found.manifest.sampling.as_read["timesteps"] == [1000.0, 600.0, 200.0]
    assert found.tensors()["timesteps"].tolist() == pytest.approx([1.0, 0.6, 0.2])
    with pytest.raises(UsageError, match="stays noisy"):
        calibrate(CalibrateOptions(at, str(tmp_path / "c"), samples=8, steps=4, spacing="quad"), QUIET)


def test_what_does_not_fit_the_model_is_refused(tmp_path: Path) -> None:
    at = dilate(DilateOptions(str(tiny_pipeline(tmp_path / "model")), str(tmp_path / "d"), scaling="wd"), QUIET)
    for options, message in (
        ({"sampler": "ddpm", "variance": "learned_range"}, "predicts no variance"),
        ({"timesteps": "a,b"}, "not a list of timesteps"),
        ({"timesteps": "900,20", "sampler": "plms"}, "takes no list"),
        ({"spacing": "cubic"}, "unknown spacing"),
    ):
        with pytest.raises(UsageError, match=message):
            calibrate(CalibrateOptions(at, str(tmp_path / "c"), samples=40, **options), QUIET)


def test_a_quadratic_calibration_is_evaluated_with_other_steps_and_a_list_is_not(tmp_path: Path) -> None:
    at = dilate(DilateOptions(str(tiny_pipeline(tmp_path / "model")), str(tmp_path / "d"), scaling="wd"), QUIET)
    from dqtool.stages.evaluation.images import maker_of_artifact

    calibrate(CalibrateOptions(at, str(tmp_path / "c"), samples=8, steps=4, spacing="quad"), QUIET)
    sampler = maker_of_artifact(open_artifact(tmp_path / "c"), 1, 0, steps=3).sampler
    assert sampler.timesteps().tolist() == [800, 200, 0]
    calibrate(CalibrateOptions(at, str(tmp_path / "c"), samples=8, timesteps="700,20"), QUIET)
    with pytest.raises(UsageError, match="a list of 2 timesteps"):
        maker_of_artifact(open_artifact(tmp_path / "c"), 1, 0, steps=3)
    assert torch.equal(open_artifact(tmp_path / "c").tensors()["timesteps"], torch.tensor([700.0, 20.0]))

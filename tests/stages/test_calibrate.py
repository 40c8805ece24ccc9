"""The trajectory covers every step evenly, and the statistics serve any bit width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dqtool.artifacts import open_artifact
from dqtool.models.networks.packed import layer_infos
from dqtool.nn.statistics import BINS
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.options.calibrate import with_steps
from dqtool.stages.shared.settings import RunSettings


@pytest.mark.parametrize(("samples", "sampler"), [(18, None), (7, "plms"), (8, "dpmsolver")])
def test_every_step_is_present_and_quotas_are_even(
    made: Path, tmp_path: Path, samples: int, sampler: str | None
) -> None:
    output = calibrate(
        CalibrateOptions(
            str(made / "dilated.safetensors"),
            str(tmp_path / "c.safetensors"),
            steps=4,
            samples=samples,
            sampler=sampler,
            batch_size=4,
        ),
        RunSettings(quiet=True),
    )
    tensors = open_artifact(output).tensors()
    counts = torch.bincount(tensors["trajectory.rows"], minlength=len(tensors["timesteps"]))
    assert counts.sum() == samples
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


def test_statistics_know_no_bits_and_count_every_value(made: Path) -> None:
    artifact = open_artifact(made / "calibrated.safetensors")
    tensors = artifact.tensors()
    steps = len(tensors["timesteps"])
    for info in layer_infos(artifact.manifest.layers):
        if info.kind == "attention":
            for operand in ("q", "k", "v", "probs"):
                assert tensors[f"{info.name}.{operand}.histogram"].shape == (steps, info.heads, BINS)
        elif info.shares is None:
            histogram = tensors[f"{info.name}.histogram"]
            assert histogram.shape == (steps, BINS)
            assert len(set(histogram.sum(1).tolist())) == 1  # the same number of values at each step
            assert tensors[f"{info.name}.channel_range"].shape == (2, info.shape[1] * info.groups)


def test_one_calibration_serves_every_width(made: Path, tmp_path: Path) -> None:
    from dqtool.stages.distill import DistillOptions, distill

    errors = []
    for bits in ("3/3", "4/4", "6/6", "8/8"):
        output = distill(
            DistillOptions(
                str(made / "calibrated.safetensors"), str(tmp_path / f"{bits[0]}.safetensors"), bits=bits, iters=0
            ),
            RunSettings(quiet=True),
        )
        errors.append(output_error(made, output))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2


def output_error(made: Path, output: str) -> float:
    """Relative squared error of the network's output on the calibration points."""
    from dqtool.stages.eval import network_of_artifact
    from dqtool.stages.shared.artifact_models import teacher_of

    calibrated = open_artifact(made / "calibrated.safetensors")
    tensors = calibrated.tensors()
    teacher = teacher_of(calibrated.manifest, tensors)
    student = network_of_artifact(open_artifact(output), "simulate")
    x, t = tensors["trajectory.x"], tensors["timesteps"][tensors["trajectory.rows"]]
    with torch.no_grad():
        expected = teacher(x, t).sample
        return float((student(x, t).sample - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("draw", ["uniform", "normal", "density"])
def test_a_draw_decides_about_training_points_and_statistics_cover_every_step(
    made: Path, tmp_path: Path, draw: str
) -> None:
    options = CalibrateOptions(
        str(made / "dilated.safetensors"), str(tmp_path / "c.safetensors"), steps=40, samples=80, draw=draw
    )
    artifact = open_artifact(calibrate(options, RunSettings(quiet=True)))
    tensors = artifact.tensors()
    counts = torch.bincount(tensors["trajectory.rows"], minlength=40)
    assert counts.sum() == len(tensors["trajectory.x"]) == 80
    assert counts.tolist() == artifact.manifest.metrics.as_read["samples_per_step"]
    assert counts.max() - counts.min() > 1
    histogram = tensors["conv_in.histogram"]
    assert histogram.shape[0] == 40
    assert histogram.sum(1).min() > 0


def test_a_stratified_draw_is_no_parameter(made: Path) -> None:
    assert "draw" not in open_artifact(made / "calibrated.safetensors").manifest.parameters.as_read


@pytest.mark.parametrize(
    ("scheduler", "sampler", "steps"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler"}, None, 1),
        ({"_class_name": "LCMScheduler"}, None, 4),
        ({"_class_name": "DDPMScheduler"}, "lcm", 4),
        ({"_class_name": "DDPMScheduler"}, None, 20),
        (None, None, 20),
    ],
)
def test_steps_are_those_that_the_sampler_is_made_for(
    scheduler: dict[str, str] | None, sampler: str | None, steps: int
) -> None:
    assert with_steps(CalibrateOptions(sampler=sampler), scheduler).steps == steps
    assert with_steps(CalibrateOptions(sampler=sampler, steps=7), scheduler).steps == 7
    assert with_steps(CalibrateOptions(sampler=sampler, timesteps="900,100"), scheduler).steps == 2

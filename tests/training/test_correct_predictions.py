"""Correction of predictions: the fitted error vanishes for any batch size, and the correction is off where it has no
meaning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_tasks import Silent
from torch import Tensor

import dqtool
import dqtool.training.prediction
from dqtool.artifacts import open_artifact
from dqtool.core.detail import detail
from dqtool.errors import UsageError
from dqtool.models.sampling.noise_correction import LEAST_FACTOR, fit_noise
from dqtool.models.sampling.sampler import CALIBRATION, image_seeds, initial_noise
from dqtool.nn.prediction import attach_prediction, corrected
from dqtool.runtimes import RUNTIMES
from dqtool.stages.calibrate import CalibrateOptions, calibrate
from dqtool.stages.distill import CORRECT_IMAGES, DistillOptions, corrects_predictions, distill, with_sampler_defaults
from dqtool.stages.export import ExportOptions, export
from dqtool.stages.planning.plan import plan_stage
from dqtool.stages.shared.settings import RunSettings
from dqtool.training import on_policy
from dqtool.training.data import DistillationTask
from dqtool.training.prediction import SEED_OFFSET, correct_predictions, fit_tables


def errors(task: DistillationTask, images: int) -> list[tuple[float, float]]:
    """Return |slope| and |bias| of every step, on the images that the tables are fitted on."""
    found: list[tuple[float, float]] = []

    def see(x: Tensor, timestep: Tensor, prediction: Tensor) -> None:
        step = fit_noise(prediction, task.family.predict(task.teacher, x, timestep, {}))
        found.append((abs(step.slope), float(step.bias.abs().max())))

    seed = SEED_OFFSET
    noise = initial_noise(tuple(task.trajectory.x.shape[1:]), range(images), seed, CALIBRATION)
    task.sampler.run(task.student, noise, {}, image_seeds(range(images), seed, CALIBRATION), see)
    return found


@pytest.fixture
def exact() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(16, 2, 12, 12, generator=generator) + torch.tensor([0.5, -1.0]).view(1, 2, 1, 1)


@pytest.fixture
def inputs(exact: Tensor) -> Tensor:
    return exact + torch.randn(exact.shape, generator=torch.Generator().manual_seed(5))


def left(quantized: Tensor, exact: Tensor, inputs: Tensor, of_images: bool = True) -> Tensor:
    """Return the error that remains after correction."""
    rows = {n: row.view(1, -1, 1, 1) for n, row in fit_tables(quantized, exact, inputs, of_images).items()}
    return corrected(quantized, inputs, rows) - exact


def test_what_was_lost_of_prediction_detail_and_input_is_found(exact: Tensor, inputs: Tensor) -> None:
    rest = 0.1 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(6))
    lost = 0.9 * exact - 0.3 * detail(exact) + 0.05 * inputs - 0.1 * detail(inputs) + 0.2
    after = left(lost + rest, exact, inputs)
    assert float(after.mean((0, 2, 3)).abs().max()) < 1e-5
    for term in (exact, detail(exact), inputs, detail(inputs)):
        assert abs(float((after * term).mean() / term.square().mean())) < 0.02
        assert abs(float(((lost + rest - exact) * term).mean() / term.square().mean())) > 0.05
    assert float(after.std()) < 1.6 * float(rest.std())  # scaling up the lost part scales up its noise


def test_of_tokens_and_without_noise_the_factor_is_that_of_ptqd(exact: Tensor, inputs: Tensor) -> None:
    rows = fit_tables(0.95 * exact + 0.1, exact, inputs, of_images=False)
    found = fit_noise(0.95 * exact + 0.1, exact)
    assert set(rows) == {"scale", "bias"}
    assert rows["scale"].tolist() == pytest.approx([1 / (1 + found.slope)] * 2, rel=1e-3)
    assert rows["bias"].tolist() == pytest.approx([-0.1 / 0.95] * 2, abs=1e-3)


@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("kept", [0.05, 0.001, -0.05, -0.127, -0.3])
def test_a_prediction_that_was_lost_is_multiplied_by_a_bounded_factor(
    exact: Tensor, inputs: Tensor, kept: float, of_images: bool
) -> None:
    rows = fit_tables(kept * exact + 0.1, exact, inputs, of_images)
    assert 3 < float(rows["scale"][0]) < 1 / LEAST_FACTOR
    assert all(float(rows[name].abs().max()) == 0 for name in rows if name not in ("scale", "bias"))


def test_detail_that_was_lost_is_not_multiplied_without_bound(exact: Tensor, inputs: Tensor) -> None:
    rows = fit_tables(exact - 0.99 * detail(exact), exact, inputs, of_images=True)
    assert 1 <= float(rows["scale"][0]) <= 1 / LEAST_FACTOR
    assert float(rows["detail"].abs().max()) == 0


def test_an_exact_prediction_is_left_alone(exact: Tensor, inputs: Tensor) -> None:
    rows = fit_tables(exact, exact, inputs, of_images=True)
    assert float((rows["scale"] - 1).abs().max()) < 1e-6
    assert max(float(rows[name].abs().max()) for name in ("bias", "detail", "input", "input_detail")) < 1e-6


def test_noise_is_not_raised_where_the_input_says_it_all(exact: Tensor) -> None:
    """In the first steps of a network that predicts noise, the prediction equals the input."""
    rest = 0.3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(7))
    after = left(exact + rest, exact, exact)
    assert float(after.square().mean()) < 1.01 * float(rest.square().mean())


def test_a_prediction_that_is_mostly_noise_is_not_blown_up(exact: Tensor, inputs: Tensor) -> None:
    rest = 5 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(8))
    rows = fit_tables(0.05 * exact + rest, exact, inputs, of_images=True)
    assert float(rows["scale"].abs().max()) < 1.5


def test_slope_and_bias_vanish_at_every_step(task: DistillationTask, silent: Silent) -> None:
    before = errors(task, 32)
    metrics = correct_predictions(task, task.teacher.config, 32, silent)
    after = errors(task, 32)
    assert max(slope for slope, _ in before) > 0.005
    assert max(bias for _, bias in before) > 0.005
    assert max(slope for slope, _ in after) < 0.1 * max(slope for slope, _ in before)
    assert max(bias for _, bias in after) < 0.1 * max(bias for _, bias in before)
    assert abs(metrics["prediction_slope"]) > 0.001
    assert metrics["prediction_bias"] > 0.001


def test_how_many_samples_run_together_changes_nothing(task: DistillationTask, silent: Silent) -> None:
    tables = []
    for together in (None, 5):
        task.network_batch = together
        correct_predictions(task, task.teacher.config, 16, silent)
        tables.append(task.student.prediction.scale.clone())
        del task.student.prediction
        task.student._forward_hooks.clear()
    assert torch.allclose(*tables, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"method": "on-policy"}, True),
        ({"method": "lsq"}, False),
        ({"method": "lsq", "correct_noise": True}, True),
        ({"method": "ptq"}, False),
        ({"iters": 0}, False),
        ({"iters": 0, "refine_iters": 5}, True),
        ({"static": True}, False),
        ({"correct_noise": False}, False),
    ],
)
def test_what_is_trained_by_our_methods_is_corrected(given: dict[str, Any], expected: bool) -> None:
    assert corrects_predictions(DistillOptions(**given)) is expected


def test_samplers_that_extrapolate_have_other_defaults(made: Path, tmp_path: Path) -> None:
    points = CalibrateOptions(
        str(made / "dilated.safetensors"), str(tmp_path / "c.safetensors"), sampler="plms", steps=4, samples=8
    )
    given = DistillOptions(calibrate(points, RunSettings(quiet=True)), str(tmp_path / "d.safetensors"), iters=1)
    dry = RunSettings(quiet=True, dry_run=True)
    distill(given, dry)
    foreseen = plan_stage(dry.log[-1], given)["work"]
    found = open_artifact(distill(given, RunSettings(quiet=True)))
    assert found.manifest.parameters.as_read["recipe"]["refine_iters"] == 0
    assert not any(name.startswith("prediction.") for name in found.tensors())
    directory = export(ExportOptions(given.output, str(tmp_path / "exported")), RunSettings(quiet=True))
    assert foreseen["bytes"] == open_artifact(directory).manifest.metrics.as_read["bytes"]
    asked = replace(given, refine_iters=1, correct_noise=True)
    assert with_sampler_defaults(asked, "PNDMScheduler") == asked
    lsq = replace(given, method="lsq")
    assert with_sampler_defaults(lsq, "PNDMScheduler") == lsq
    assert with_sampler_defaults(given, "DDIMScheduler") == given


def test_static_quantizers_have_no_steps_to_correct() -> None:
    with pytest.raises(UsageError, match="--static"):
        DistillOptions(static=True, correct_noise=True)


def test_low_memory_fetches_the_float_network_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two iterations on few images would train the two networks apart.
    monkeypatch.setattr(on_policy, "images_for", lambda options, _step, _steps: options.images)
    given = {"iters": 1, "refine_iters": 2, "bits": "4/4"}
    found = {}
    for low in (False, True):
        path = str(tmp_path / f"{low}.safetensors")
        options = DistillOptions(str(made / "calibrated.safetensors"), path, low_memory=low, **given)
        found[low] = open_artifact(distill(options, RunSettings(quiet=True)))
        assert found[low].manifest.parameters.as_read["correct_images"] == CORRECT_IMAGES
    scales = [found[low].tensors()["prediction.scale"] for low in (False, True)]
    assert torch.allclose(*scales, atol=0.04)  # other batches round differently; without tables the largest is 0.1 off
    assert float((scales[0] - 1).abs().max()) > 1e-3


def test_exports_hold_the_tables_and_every_runtime_reads_them(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tripled(task: DistillationTask, _config: Any, _images: int, _progress: Any) -> dict[str, Any]:
        rows = torch.ones(len(task.trajectory.timesteps), 1, 1, 1)
        factors = {"scale": 3 * rows, "bias": rows, "detail": rows, "input": 0.5 * rows, "input_detail": -rows}
        attach_prediction(task.student, factors)  # much larger than the effect of a rounding tie
        return {}

    monkeypatch.setattr(dqtool.training.prediction, "correct_predictions", tripled)
    given = DistillOptions(
        str(made / "calibrated.safetensors"), str(tmp_path / "d.safetensors"), iters=1, refine_iters=1
    )
    dry = RunSettings(quiet=True, dry_run=True)
    distill(given, dry)
    foreseen = plan_stage(dry.log[-1], given)["work"]["bytes"]
    directory = export(
        ExportOptions(distill(given, RunSettings(quiet=True)), str(tmp_path / "exported")), RunSettings(quiet=True)
    )
    exported = open_artifact(directory)
    metrics = exported.manifest.metrics.as_read
    assert metrics["bytes"] == metrics["bytes_predicted"] == foreseen
    state = open_artifact(given.output).tensors()
    x, timestep = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), state["timesteps"][1]
    network = dqtool.load(directory, "simulate")
    expected = network(x, timestep).sample
    network._forward_hooks.clear()
    plain = network(x, timestep).sample
    assert torch.allclose(expected, plain * 3 + 1 + 0.5 * x + detail(plain - x), atol=1e-5)
    for runtime in ("cpu", "openvino"):
        if RUNTIMES[runtime].engine().available() is None:
            got = dqtool.load(directory, runtime)(x, timestep).sample
            assert float((got - expected).norm()) < 0.1 * float(expected.norm())  # codes on a tie may flip


def test_the_dense_export_leaves_out_what_quantized_activations_call_for(made: Path, tmp_path: Path) -> None:
    options = DistillOptions(
        str(made / "calibrated.safetensors"), str(tmp_path / "d.safetensors"), iters=1, refine_iters=1
    )
    dense = export(
        ExportOptions(distill(options, RunSettings(quiet=True)), str(tmp_path / "dense"), "dense"),
        RunSettings(quiet=True),
    )
    names = [
        name
        for path in Path(dense).rglob("*.safetensors")
        for name in open_artifact(dense).tensors(file=str(path.relative_to(dense)))
    ]
    assert names
    assert not [name for name in names if name.startswith("prediction.")]

"""The estimate of every operand's error against errors that are measured one by one."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from dqtool.artifacts import open_artifact
from dqtool.core.bits import LayerBits
from dqtool.core.quantization import KeptLayers, QuantizationSpec
from dqtool.models.networks.loading import network_of
from dqtool.precision.step_weights import step_weights
from dqtool.stages import precision
from dqtool.stages.precision import MeasuredErrors, measure
from dqtool.stages.shared.artifact_models import student_of


@pytest.fixture(scope="module")
def measured(made: Path) -> MeasuredErrors:
    artifact = open_artifact(str(made / "calibrated.safetensors"), ["calibrate"])
    return measure(artifact.manifest, artifact.tensors(), passes=64, widths=(4, 8))


def direct_error(measured: MeasuredErrors, layer: str, bits: LayerBits) -> float:
    """Mean over trajectory points of the squared error of predictions, weighted as errors reach the sample."""
    family, _ = network_of(measured.manifest.network)
    trajectory = measured.trajectory
    float_bits = KeptLayers(".*", LayerBits(16, 16))
    predictions = []
    for kept in ((float_bits,), (float_bits, KeptLayers(layer, bits))):
        network = student_of(
            measured.manifest, measured.tensors, measured.plans(QuantizationSpec(LayerBits(8, 8), kept=kept))
        )
        with torch.no_grad():
            predictions.append(family.predict(network, *trajectory.arguments(slice(None))))
    weights = step_weights(measured.sampler, trajectory)
    squared = (predictions[1] - predictions[0]).double().square().flatten(1).mean(1)
    return float((squared * weights[trajectory.rows].square()).mean()) * len(trajectory.timesteps)


@pytest.mark.parametrize(
    ("layer", "operand", "bits"),
    [
        ("conv_in", "weights", LayerBits(4, 16)),
        ("conv_out", "input", LayerBits(16, 4)),
        ("down_blocks.0.resnets.0.conv2", "input", LayerBits(16, 4)),
        ("up_blocks.1.resnets.0.conv1", "weights", LayerBits(4, 16)),
    ],
)
def test_estimates_are_what_is_measured(measured: MeasuredErrors, layer: str, operand: str, bits: LayerBits) -> None:
    width = min(bits.weight, bits.input)
    estimated = measured.errors[layer, operand][width]
    direct = direct_error(measured, layer.replace(".", r"\."), bits)
    assert abs(10 * math.log10(estimated / direct)) < 3, (estimated, direct)


def test_every_operand_has_an_error_that_falls_with_bits(measured: MeasuredErrors) -> None:
    names = {info.name for info in measured.layers if info.kind != "attention"}
    assert {layer for layer, operand in measured.errors if operand == "weights"} == names
    assert {operand for _, operand in measured.errors} == {"weights", "input", "q·k", "softmax·v"}
    coarse, fine = (sum(errors[bits] for errors in measured.errors.values()) for bits in (4, 8))
    assert coarse > 20 * fine


def test_weights_of_steps_are_those_of_the_sampler(measured: MeasuredErrors) -> None:
    """DDIM: the step's response to an error in the predicted noise, and behind it the share of the state."""
    sampler, trajectory = measured.sampler, measured.trajectory
    weights = step_weights(sampler, trajectory)
    alphas = sampler.scheduler.alphas_cumprod.double()
    timesteps = trajectory.timesteps.long().tolist()
    for row, t in enumerate(timesteps[1:], 1):  # the first is clipped
        last = row == len(timesteps) - 1
        after = sampler.scheduler.final_alpha_cumprod.double() if last else alphas[timesteps[row + 1]]
        response = abs((1 - after).sqrt() - after.sqrt() * ((1 - alphas[t]) / alphas[t]).sqrt())
        share = 1.0 if last else 0.5 / float(trajectory.x[trajectory.rows == row + 1].std())
        assert float(weights[row]) == pytest.approx(float(response) * share, rel=1e-3)


def test_a_guided_sampler_weighs_both_predictions(measured: MeasuredErrors) -> None:
    guided = dataclasses.replace(measured.sampler, guidance=3.0)
    ratio = step_weights(guided, measured.trajectory) / step_weights(measured.sampler, measured.trajectory)
    assert torch.allclose(ratio, torch.full_like(ratio, 13**0.5))


def test_errors_are_measured_once(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second choice of bits for the same artifact reads the errors back; a damaged cache is measured again."""
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path))
    artifact = open_artifact(str(made / "calibrated.safetensors"), ["calibrate"])
    calls = []
    real = precision.measure_errors
    monkeypatch.setattr(precision, "measure_errors", lambda *given: (calls.append(1), real(*given))[1])

    def errors(passes: int) -> object:
        return measure(artifact.manifest, artifact.tensors(), passes, (4, 8)).errors

    first = errors(1)
    assert errors(1) == first
    assert len(calls) == 1
    errors(2)
    assert len(calls) == 2
    for kept in (tmp_path / "errors").iterdir():
        kept.write_text('{"errors": [[1, 2]]}')
    assert errors(1) == first
    assert len(calls) == 3

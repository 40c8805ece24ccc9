"""The recorder of trajectories goes on where it was interrupted, in images and in those that begin at given ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from helpers import NETWORK

from dqtool.artifacts import Workspace
from dqtool.errors import NumericError
from dqtool.models.conditions.conditioning import Conditions
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.sampler import Sampler, make_sampler
from dqtool.stages.calibration.trajectory import TrajectoryRecorder
from dqtool.stages.options.calibrate import CalibrateOptions

FAMILY = FAMILIES["UNet2DModel"]
CALLS = 2 * 5 + 4 + 3 + 2 + 1
"""Two batches of five steps; then four parts from images, which leave out one to four steps."""


@pytest.mark.parametrize("interrupted", [3, 7, 12, 15, 19])
def test_an_interrupted_recording_makes_no_call_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: int
) -> None:
    monkeypatch.setattr("dqtool.artifacts.checkpoints.EVERY", 0.0)
    torch.manual_seed(0)
    network = UNet2DModel(**NETWORK).eval()
    sampler = Sampler(FAMILY, make_sampler({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}), 5)
    options = CalibrateOptions("dilated.safetensors", samples=40, batch_size=4, seed=3)
    calls, limit = [0], [10**9]
    predict = type(FAMILY).predict

    def counted(*given: Any) -> Any:
        if calls[0] == limit[0]:
            raise KeyboardInterrupt
        calls[0] += 1
        return predict(*given)

    monkeypatch.setattr(type(FAMILY), "predict", counted)

    def recorded(output: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        starts = torch.rand(3, *NETWORK_SHAPE, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        recorder = TrajectoryRecorder(network, NETWORK_SHAPE, sampler, sampler.timesteps(), options, generator, starts)
        return recorder.record(Conditions({}), torch.full((5,), 8), Workspace(tmp_path / output, "key"))

    whole = recorded("whole")
    assert calls[0] == CALLS
    calls[0], limit[0] = 0, interrupted
    with pytest.raises(KeyboardInterrupt):
        recorded("parted")
    limit[0] = 10**9
    found = recorded("parted")
    assert calls[0] == CALLS
    for mine, others in zip(found, whole, strict=True):
        assert mine.keys() == others.keys()
        assert all(torch.equal(mine[name], others[name]) for name in mine)


def test_samples_that_are_not_finite_are_refused_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dqtool.artifacts.checkpoints.EVERY", 0.0)
    monkeypatch.setattr(type(FAMILY), "predict", lambda _family, _network, x, *_given: x * float("nan"))
    sampler = Sampler(FAMILY, make_sampler({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000}), 5)
    options = CalibrateOptions("dilated.safetensors", samples=10, batch_size=1)
    network = UNet2DModel(**NETWORK).eval()
    for _attempt in range(2):
        recorder = TrajectoryRecorder(
            network, NETWORK_SHAPE, sampler, sampler.timesteps(), options, torch.Generator().manual_seed(0)
        )
        with pytest.raises(NumericError):
            recorder.record(Conditions({}), torch.full((5,), 2), Workspace(tmp_path / "x", "key"))


NETWORK_SHAPE = FAMILY.sample_shape(dict(NETWORK))

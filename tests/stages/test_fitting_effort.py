"""Samples and iterations of `quantize` for networks that are too large for the usual ones on a CPU."""

from __future__ import annotations

import pytest

from dqtool.stages import quantize
from dqtool.stages.options.quantize import QuantizeOptions
from dqtool.stages.planning.training import Training, samples_that_fit, training_that_fits

USUAL = Training(300, 32)


@pytest.mark.parametrize(
    ("macs", "iters", "batch_size"),
    [
        (0, 300, 32),
        (450 * 10**6, 300, 32),  # zoo:fashion
        (10**9, 300, 23),  # 14,000 samples in 600 iterations
        (8_846_954_496, 98, 8),  # 1,582 samples
        (340 * 10**9, 60, 8),  # Stable Diffusion
    ],
)
def test_batches_shrink_before_iterations(macs: int, iters: int, batch_size: int) -> None:
    assert training_that_fits(macs, USUAL, 14 * 10**12) == Training(iters, batch_size)


def test_a_short_usual_training_stays_as_it_is() -> None:
    assert training_that_fits(1, Training(100, 8)) == Training(100, 8)


@pytest.mark.parametrize(
    ("macs", "samples"), [(0, 5120), (448_077_824, 5120), (8_846_954_496, 527), (340 * 10**9, 256)]
)
def test_samples_of_large_networks(macs: int, samples: int) -> None:
    assert samples_that_fit(macs, 5120, 256, 14 * 10**12) == samples


@pytest.mark.parametrize("family", [None, "generic"])
@pytest.mark.parametrize(("device", "lowered"), [("cpu", True), ("cuda", False)])
def test_only_the_cpu_takes_less(
    monkeypatch: pytest.MonkeyPatch, device: str, lowered: bool, family: str | None
) -> None:
    import torch

    from dqtool.core import device as devices
    from dqtool.stages.planning import estimate

    monkeypatch.setattr(estimate, "network_size", lambda _source: (8_846_954_496, 337))
    monkeypatch.setattr(devices, "resolve_device", lambda text: torch.device(text))
    options = QuantizeOptions(model="zoo:digits-ddpm", output="out", family=family)
    steps = dict(quantize.steps_of(options, device))
    training = {key: steps["distill"].get(key) for key in ("iters", "refine_iters", "batch_size")}
    assert training == (
        {"iters": 98, "refine_iters": 98, "batch_size": 8} if lowered else dict.fromkeys(training, None)
    )
    assert steps["calibrate"].get("samples") == (527 if lowered else None)
    asked = dict(quantize.steps_of(QuantizeOptions(model="zoo:digits-ddpm", output="out", samples=40), device))
    assert asked["calibrate"]["samples"] == 40

"""PTQD: what is left after correction is correlated with nothing; an exact network is left alone; variances add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dqtool.artifacts import open_artifact
from dqtool.models.sampling.network_time import NetworkTime
from dqtool.models.sampling.noise_correction import NoiseCorrection, StepNoise, fit_noise, noise_scale, response
from dqtool.models.sampling.sampler import Sampler, make_sampler
from dqtool.stages.eval import network_of_artifact
from dqtool.stages.evaluation.images import maker_of_artifact
from dqtool.stages.evaluation.noise import FIT_IMAGES, fit_correction


def test_corrected_noise_is_uncorrelated_with_the_prediction_and_unbiased() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(32, 3, 8, 8, generator=generator) + torch.tensor([0.5, 0.0, -1.0]).view(1, 3, 1, 1)
    rest = 0.2 * torch.randn(exact.shape, generator=generator)
    quantized = 0.8 * exact + torch.tensor([0.1, -0.3, 0.0]).view(1, 3, 1, 1) + rest
    found = fit_noise(quantized, exact)
    assert found.slope == pytest.approx(-0.2, abs=0.01)
    assert found.bias.tolist() == pytest.approx([0.1, -0.3, 0.0], abs=0.02)
    assert found.variance == pytest.approx((0.2 / 0.8) ** 2, rel=0.05)
    assert found.correlation < -0.5
    left = (found.corrected(quantized, exact) - exact).double()
    by_channel = left.transpose(0, 1).flatten(1)
    e = exact.double().transpose(0, 1).flatten(1)
    assert by_channel.mean(1).abs().max() < 1e-6
    product = ((e - e.mean(1, keepdim=True)) * by_channel).mean()
    assert abs(float(product)) < 1e-6
    assert float(left.square().mean()) == pytest.approx(found.variance, rel=1e-6)


def test_an_exact_prediction_is_left_alone_bit_for_bit() -> None:
    exact = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    found = fit_noise(exact, exact)
    assert (found.slope, found.variance, found.correlation) == (0.0, 0.0, 0.0)
    assert torch.equal(found.corrected(exact, exact), exact)


def test_corrections_survive_json() -> None:
    correction = NoiseCorrection({999.0: StepNoise(0.1, torch.tensor([0.5, -0.25]), 0.01, 0.3)})
    again = NoiseCorrection.from_json(correction.to_json())
    assert again.to_json() == correction.to_json()
    x = torch.ones(1, 2, 1, 1)
    assert torch.equal(again.corrected(x, torch.tensor(999.0), x), correction.corrected(x, torch.tensor(999.0), x))
    assert torch.equal(again.corrected(x, torch.tensor(1.0), x), x)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_the_noise_and_the_response_of_a_step_are_what_the_sampler_does(name: str) -> None:
    scheduler = make_sampler(None, name)
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[5]
    extra = {"eta": 1.0} if name == "ddim" else {}
    x = torch.zeros(1, 1, 200, 200)
    generator = torch.Generator().manual_seed(0)
    after = scheduler.step(x, t, x, generator=generator, **extra).prev_sample
    assert float(after.std()) == pytest.approx(noise_scale(scheduler, t, 1.0), rel=0.02)
    small = torch.full_like(x, 0.01)
    moved = scheduler.step(small, t, x, generator=torch.Generator().manual_seed(0), **extra).prev_sample - after
    assert float(moved.mean()) == pytest.approx(0.01 * response(scheduler, t, {**extra, "generator": None}), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0), ("plms", 0.0), ("dpmsolver", 0)]
)
def test_nothing_to_correct_changes_nothing(name: str, eta: float) -> None:
    sampler, noise = _sampler(name, eta)
    plain = sampler.run(torch.nn.Identity(), noise, {}, [1, 2])
    nothing = NoiseCorrection({float(t): StepNoise(0.0, torch.zeros(1), 0.0) for t in sampler.timesteps()})
    assert torch.equal(replace(sampler, correction=nothing).run(torch.nn.Identity(), noise, {}, [1, 2]), plain)


def test_the_rest_of_the_error_takes_the_place_of_sampling_noise() -> None:
    """A network with independent errors, corrected: samples vary as much as the exact network's."""
    sampler, noise = _sampler("ddim", 1.0, count=1, size=64)
    rest = 0.3
    known = NoiseCorrection({float(t): StepNoise(0.0, torch.zeros(1), rest**2) for t in sampler.timesteps()})

    def spread(error: float, correction: NoiseCorrection | None) -> float:
        generator = torch.Generator().manual_seed(5)
        family = _Zero(lambda x: error * torch.randn(x.shape, generator=generator))
        chosen = replace(sampler, family=family, correction=correction)
        return float(chosen.run(torch.nn.Identity(), noise, {}, [7]).std())

    exact, wrong, corrected = spread(0.0, None), spread(rest, None), spread(rest, known)
    assert abs(corrected - exact) < 0.2 * abs(wrong - exact)


class _Zero:
    """A family whose network predicts nothing but an error."""

    def time(self, config):
        return NetworkTime()

    def __init__(self, error) -> None:
        self.error = error

    def predict(self, _model, x, _timestep, _conditions):
        return self.error(x)


def _sampler(name: str, eta: float, count: int = 2, size: int = 4) -> tuple[Sampler, torch.Tensor]:
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "clip_sample": False}
    family = _Zero(lambda x: 0.1 * x)
    sampler = Sampler(family, make_sampler(config, name), 6, eta)  # type: ignore[arg-type]
    return sampler, torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(3))


def test_eval_and_sample_correct_and_say_what_they_need(chain: Path, run) -> None:
    done = run("eval", "exported", "--samples", "4", "--correct-noise", "-o", "c.json", cwd=chain)
    assert done.returncode == 0, done.stderr
    import json

    steps = json.loads((chain / "c.json").read_text())["metrics"]["noise_correction"]["steps"]
    assert len(steps) == 4
    assert any(step["slope"] != 0 for step in steps)
    done = run("sample", "exported", "-n", "4", "--correct-noise", "-o", "a.png", cwd=chain)
    assert done.returncode == 0, done.stderr
    done = run("sample", "exported", "-n", "4", "-o", "b.png", cwd=chain)
    assert (chain / "a.png").read_bytes() != (chain / "b.png").read_bytes()
    (chain / "tiny").rename(chain / "moved")
    for command in (["eval", "exported", "--samples", "4", "-o", "d.json"], ["sample", "exported", "-n", "4"]):
        refused = run(*command, "--correct-noise", cwd=chain)
        assert refused.returncode == 4
        assert "--reference" in refused.stderr
    done = run("sample", "exported", "-n", "4", "--correct-noise", "--reference", "moved", "-o", "e.png", cwd=chain)
    assert done.returncode == 0, done.stderr
    assert (chain / "a.png").read_bytes() == (chain / "e.png").read_bytes()


def test_the_fit_is_of_as_many_images_whatever_the_batch_size(made: Path) -> None:
    artifact, seen = open_artifact(str(made / "exported")), []
    maker = maker_of_artifact(artifact, 4, 0)
    network = network_of_artifact(artifact, "simulate")
    exact = network_of_artifact(open_artifact(str(made / "dilated.safetensors")), "simulate")
    for each in (network, exact):
        each.register_forward_pre_hook(lambda _m, _a, given: seen.append(len(given["sample"])), with_kwargs=True)
    whole, parts = (fit_correction(network, exact, maker, 0, batch_size).to_json() for batch_size in (128, 24))
    steps = 2 * len(whole)
    assert seen == [FIT_IMAGES] * steps + [24, 24, 16] * steps
    for one, other in zip(whole, parts, strict=True):
        for key in ("slope", "variance", "bias"):
            assert other[key] == pytest.approx(one[key], rel=1e-2, abs=1e-4)


def test_nothing_is_corrected_where_both_networks_are_one(chain: Path, run) -> None:
    """A dilated artifact's network is the full-precision one up to round-off."""
    done = run(
        "eval", "dilated.safetensors", "--samples", "4", "--steps", "4", "--correct-noise", "-o", "c.json", cwd=chain
    )
    assert done.returncode == 0, done.stderr
    import json

    for step in json.loads((chain / "c.json").read_text())["metrics"]["noise_correction"]["steps"]:
        assert abs(step["slope"]) < 1e-5
        assert step["variance"] < 1e-10

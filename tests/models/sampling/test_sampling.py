"""The scheduler objects of diffusers drive the sampling loop, and every sampler indexes its own step."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from helpers import NETWORK
from torch import nn

from dqtool.core.bits import LayerBits
from dqtool.core.quantization import QuantizationSpec
from dqtool.errors import UsageError
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.sampler import SAMPLERS, Sampler, initial_noise, make_sampler
from dqtool.nn.assignment import assign_bits
from dqtool.nn.surgery import insert_fake, steps_of

FAMILY = FAMILIES["UNet2DModel"]
SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DModel(**NETWORK).eval()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_call_of_every_sampler_finds_its_own_entry(model: nn.Module, name: str, eta: float) -> None:
    sampler = Sampler(FAMILY, make_sampler(SCHEDULE, name), 5, eta)
    timesteps = sampler.timesteps()
    traced = FAMILY.graph(model, model.config).trace
    quantized = UNet2DModel(**NETWORK).eval()
    insert_fake(quantized, assign_bits(traced.layers, QuantizationSpec(LayerBits(16, 16))), timesteps, {})
    asked: list[float] = []
    used: list[float] = []

    def see(_x: torch.Tensor, timestep: torch.Tensor, _y: torch.Tensor) -> None:
        asked.append(float(timestep))
        used.append(float(timesteps[steps_of(quantized).rows]))

    noise = initial_noise((1, 8, 8), range(2), 0)
    sampler.run(quantized, noise, {}, [1, 2], see)
    assert used == asked
    assert not steps_of(quantized).missed
    if name == "plms":
        assert len(asked) > len(set(asked))  # the doubled second call
    assert set(asked) == set(timesteps.tolist())


def test_sampler_classes_follow_their_names() -> None:
    for name, class_name in SAMPLERS.items():
        assert type(make_sampler(SCHEDULE, name)).__name__ == class_name
    assert type(make_sampler(None)).__name__ == "DDIMScheduler"
    with pytest.raises(UsageError, match="unknown sampler"):
        make_sampler(SCHEDULE, "euler9")


def test_the_loop_equals_the_pipeline(model: nn.Module) -> None:
    scheduler = make_sampler(SCHEDULE)
    noise = initial_noise((1, 8, 8), range(3), 7)
    ours = Sampler(FAMILY, scheduler, 4).run(model, noise, {})
    pipeline = DDIMPipeline(model, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    scheduler.set_timesteps(4)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t).sample.detach(), t, x).prev_sample
    assert torch.equal(ours, x)


def test_an_image_depends_on_seed_and_index_alone(model: nn.Module) -> None:
    sampler = Sampler(FAMILY, make_sampler(SCHEDULE), 3, eta=1.0)
    together = torch.cat(list(sampler.batches(model, (1, 8, 8), 5, 3, 5)))
    apart = torch.cat(list(sampler.batches(model, (1, 8, 8), 5, 3, 2)))
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    other = torch.cat(list(sampler.batches(model, (1, 8, 8), 5, 4, 5)))
    assert not torch.allclose(together, other)


def test_a_pipeline_keeps_its_own_scheduler_and_others_take_its_noise_schedule() -> None:
    own = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_schedule": "scaled_linear", "beta_end": 0.012}
    assert type(make_sampler(own)).__name__ == "PNDMScheduler"
    changed = make_sampler(own, "euler")
    assert (type(changed).__name__, changed.config.beta_end) == ("EulerDiscreteScheduler", 0.012)


def test_flow_matching_takes_euler_and_nothing_else() -> None:
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    assert type(make_sampler(own, "euler")).__name__ == "FlowMatchEulerDiscreteScheduler"
    for name in ("ddim", "ddpm", "plms", "dpmsolver"):
        with pytest.raises(UsageError, match="flow matching"):
            make_sampler(own, name)


def test_another_sampler_than_calibrated_takes_the_nearest_steps_and_warns(model: nn.Module) -> None:
    from dqtool.errors import DqtoolWarning

    timesteps = Sampler(FAMILY, make_sampler(SCHEDULE, "ddim"), 5).timesteps()
    traced = FAMILY.graph(model, model.config).trace
    quantized = UNet2DModel(**NETWORK).eval()
    insert_fake(quantized, assign_bits(traced.layers, QuantizationSpec(LayerBits(16, 16))), timesteps, {})
    other = Sampler(FAMILY, make_sampler({**SCHEDULE, "timestep_spacing": "linspace"}, "euler"), 5)
    with pytest.warns(DqtoolWarning, match="not among the 5 calibrated"):
        other.run(quantized, initial_noise((1, 8, 8), range(2), 0), {})
    assert steps_of(quantized).missed


def test_guidance_asks_for_both_and_extrapolates() -> None:
    class Spy(nn.Module):
        def forward(self, sample, timestep, class_labels, return_dict):
            assert len(sample) == 4
            assert class_labels.tolist() == [9, 9, 1, 2]
            return (class_labels.view(-1, 1, 1, 1).float().expand_as(sample),)

    config = {"_class_name": "EulerDiscreteScheduler", "prediction_type": "epsilon"}
    sampler = Sampler(FAMILY, make_sampler(config), 1, guidance=3.0)
    noise = initial_noise((1, 8, 8), range(2), 0)
    found = sampler.run(Spy(), noise, {"class_labels": torch.tensor([1, 2])}, null={"class_labels": torch.tensor([9])})
    sigma = make_sampler(config)
    sigma.set_timesteps(1)
    wanted = torch.tensor([9 + 3.0 * (1 - 9), 9 + 3.0 * (2 - 9)]).view(2, 1, 1, 1)
    torch.testing.assert_close(found, noise * sigma.init_noise_sigma - sigma.sigmas[0] * wanted, rtol=1e-4, atol=1e-3)


def test_images_past_the_budget_are_the_same_from_a_file(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from dqtool.models.conditions.conditioning import Conditions
    from dqtool.stages.evaluation import images

    maker = images.ImageMaker(Sampler(FAMILY, make_sampler(SCHEDULE), 2), Conditions({}), (1, 8, 8))
    held = maker.draw(model, 5, 0, 2, "test")
    monkeypatch.setattr(images, "IN_MEMORY", 100)
    spilled = maker.draw(model, 5, 0, 2, "test")
    assert torch.equal(held, spilled)
    assert held.shape == (5, 1, 8, 8)


def test_errors_of_layers_compare_the_same_inputs_in_any_number_of_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dqtool.models.conditions.conditioning import Conditions
    from dqtool.stages.evaluation import figures, images

    torch.manual_seed(0)
    network = UNet2DModel(**NETWORK, num_class_embeds=9).eval()
    other = copy.deepcopy(network)
    other.conv_in.weight.data *= 1.1
    table = {"class_labels": torch.arange(9)}
    maker = images.ImageMaker(Sampler(FAMILY, make_sampler(SCHEDULE), 2), Conditions(table), (1, 8, 8))
    monkeypatch.setattr(figures, "LAYER_SAMPLES", 10)  # 5 images, for which classes are chosen evenly
    assert set(figures.layer_errors(network, copy.deepcopy(network), maker, 0).values()) == {0.0}
    together = figures.layer_errors(network, other, maker, 0)
    monkeypatch.setattr(figures, "LAYER_BYTES", 1)
    one_by_one = figures.layer_errors(network, other, maker, 0)
    assert together["conv_in"] > 0
    assert together == pytest.approx(one_by_one, rel=1e-4)

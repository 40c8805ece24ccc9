"""Schedulers by name and with other timesteps: against the DDIM reference code's formulas, and refused where they don't fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from families import NETWORKS, build
from torch import nn

from dqtool.errors import UsageError
from dqtool.models.families import FAMILIES
from dqtool.models.sampling.listed_ddim import ListedDDIMScheduler
from dqtool.models.sampling.sampler import Sampler, initial_noise, make_sampler
from dqtool.models.sampling.schedulers import SchedulerChoices, quadratic_timesteps

LINEAR = {"_class_name": "DDIMScheduler", "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FAMILY = FAMILIES["UNet2DModel"]


class Curve(nn.Module):
    """A prediction that depends on everything, in closed form."""

    def forward(self, sample, timestep, return_dict):
        return ((sample * 0.7 + torch.sin(sample + timestep / 300)).tanh(),)


@pytest.mark.parametrize("steps", [2, 10, 100])
def test_the_quadratic_spacing_is_that_of_the_reference_code(steps: int) -> None:
    reference = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    assert list(quadratic_timesteps(1000, steps)) == sorted(set(reference), reverse=True)
    with pytest.raises(UsageError, match="one step"):
        quadratic_timesteps(1000, 1)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_quadratic_ddim_is_that_of_the_reference_code(eta: float) -> None:
    """`generalized_steps` of github.com/ermongroup/ddim, duplicates of its list included."""
    scheduler = make_sampler(LINEAR, None, SchedulerChoices("quad", clip=False))
    listed = SchedulerChoices("quad").listed(scheduler, 12)
    x = noise = initial_noise((1, 4, 4), range(2), 0)
    ours = Sampler(FAMILY, scheduler, 12, eta, listed=listed).run(Curve(), noise, {}, [3, 4])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    betas = torch.linspace(1e-4, 0.02, 1000)
    alphas = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])  # [t + 1]
    sequence = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), 12) ** 2]
    for i, j in zip(reversed(sequence), reversed([-1, *sequence[:-1]]), strict=True):
        if i == j:
            continue
        at, at_next = alphas[i + 1], alphas[j + 1]
        et = Curve()(x, torch.tensor(i), return_dict=False)[0]
        x0 = (x - et * (1 - at).sqrt()) / at.sqrt()
        c1 = eta * ((1 - at / at_next) * (1 - at_next) / (1 - at)).sqrt()
        c2 = ((1 - at_next) - c1**2).sqrt()
        drawn = torch.cat([torch.randn(1, 1, 4, 4, generator=g) for g in generators]) if eta else 0
        x = at_next.sqrt() * x0 + c1 * drawn + c2 * et
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [True, False])
def test_an_even_list_gives_what_diffusers_gives(kind: str, clip: bool) -> None:
    own = DDIMScheduler(prediction_type=kind, clip_sample=clip)
    own.set_timesteps(10)
    listed = ListedDDIMScheduler.from_config(own.config)
    listed.set_timesteps(timesteps=own.timesteps.tolist())
    x, prediction = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    for timestep in own.timesteps:
        seeds = [torch.Generator().manual_seed(1) for _ in range(2)]
        results = [
            s.step(prediction, timestep, x, eta=0.5, generator=g) for s, g in zip((own, listed), seeds, strict=True)
        ]
        torch.testing.assert_close(results[0].prev_sample, results[1].prev_sample)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacings_are_those_of_diffusers(spacing: str) -> None:
    scheduler = make_sampler(LINEAR, None, SchedulerChoices(spacing))
    expected = DDIMScheduler(timestep_spacing=spacing)
    expected.set_timesteps(5)
    assert Sampler(FAMILY, scheduler, 5).timesteps().tolist() == expected.timesteps.tolist()


def test_choices_that_do_not_exist_are_refused() -> None:
    for values, message in (
        ({"spacing": "cubic"}, "unknown spacing"),
        ({"variance": "learned"}, "unknown variance"),
        ({"spacing": "quad", "timesteps": (3.0,)}, "spacing of its own|own spacing"),
    ):
        with pytest.raises(UsageError, match=message):
            SchedulerChoices(**values)
    for config, choices, message in (
        (LINEAR, SchedulerChoices(variance="learned_range"), "has no variance_type"),
        ({"_class_name": "LCMScheduler"}, SchedulerChoices(clip=False), None),
        ({"_class_name": "CMStochasticIterativeScheduler"}, SchedulerChoices("trailing"), "has no timestep_spacing"),
    ):
        if message is None:
            assert make_sampler(config, None, choices).config.clip_sample is False
        else:
            with pytest.raises(UsageError, match=message):
                make_sampler(config, None, choices)
    for name, timesteps, message in (
        ("plms", (999.0, 10.0), "takes no list"),
        ("ddim", (10.0, 999.0), "must fall"),
        ("ddim", (1000.0, 3.0), "whole numbers from 0 to 999"),
    ):
        with pytest.raises(UsageError, match=message):
            Sampler(FAMILY, make_sampler(LINEAR, name), 2, listed=timesteps).timesteps()
    with pytest.raises(UsageError, match="can't take 60 steps"):
        Sampler(FAMILY, make_sampler(LINEAR, "lcm"), 60).timesteps()


FLOWS = {
    "FLUX": {"use_dynamic_shifting": True},
    "SD3": {"shift": 3.0},
    "stretched": {"shift": 3.0, "shift_terminal": 0.1},
    "karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("kind", FLOWS)
def test_listed_timesteps_of_flow_matching_are_the_noise_levels_of_training(kind: str) -> None:
    """Euler's steps of the tiny FLUX network by hand: noise level t / 1000, whatever the shift of the model."""
    family, config = FAMILIES["FluxTransformer2DModel"], NETWORKS["flux"]
    network, generator = build("flux"), torch.Generator().manual_seed(0)
    given = family.conditions(config, 2, generator)
    scheduler = make_sampler({"_class_name": "FlowMatchEulerDiscreteScheduler", **FLOWS[kind]})
    sampler = Sampler(family, scheduler, 3, tokens=family.tokens(config), listed=(1000.0, 612.5, 200.0))
    assert sampler.timesteps().tolist() == pytest.approx([1.0, 0.6125, 0.2])
    x = noise = initial_noise(family.sample_shape(config), range(2), 0)
    found = sampler.run(network, noise, given)
    with torch.no_grad():
        for level, after in ((1.0, 0.6125), (0.6125, 0.2), (0.2, 0.0)):
            x = x + (after - level) * family.predict(network, x, torch.tensor(level), given)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("name", ["Euler", "LCM"])
def test_a_flow_schedule_lists_its_own_timesteps(name: str, kind: str, inverted: bool) -> None:
    own = {"_class_name": "FlowMatchEulerDiscreteScheduler", **FLOWS[kind], "invert_sigmas": inverted}
    if name == "LCM":
        own["_class_name"] = "FlowMatchLCMScheduler"
    scheduler = make_sampler(own)
    expected = Sampler(FAMILY, scheduler, 4, tokens=1024)._fresh()
    listed = Sampler(FAMILY, scheduler, 4, tokens=1024, listed=expected.timesteps.tolist())._fresh()
    torch.testing.assert_close(listed.timesteps, expected.timesteps)
    torch.testing.assert_close(listed.sigmas, expected.sigmas)


def test_flow_schedules_refuse_lists_that_they_can_not_follow() -> None:
    flow = "FlowMatchEulerDiscreteScheduler"
    solver = {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0}
    for config, timesteps, message in (
        ({"_class_name": flow}, (200.0, 1000.0), "must fall from at most 1000 to above 0"),
        ({"_class_name": flow}, (1001.0, 200.0), "must fall"),
        ({"_class_name": flow}, (1000.0, 0.0), "must fall"),
        ({"_class_name": flow}, (1000.0, float("nan"), 200.0), "must fall"),
        ({"_class_name": flow, "invert_sigmas": True}, (1000.0, 200.0), "must rise from at least 0 to below 1000"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, (1000.0, 200.0), "takes no list.* --sampler .euler."),
        (solver, (900.0, 200.0), "takes no list.* --sampler .euler."),
    ):
        with pytest.raises(UsageError, match=message):
            Sampler(FAMILY, make_sampler(config), 2, listed=timesteps)
    with pytest.raises(UsageError, match="stays noisy"):
        SchedulerChoices("quad").listed(make_sampler({"_class_name": flow}), 4)


@pytest.mark.parametrize(
    "own",
    [
        {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
        {"_class_name": "FlowMatchLCMScheduler", "shift": 3.0},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0},
    ],
)
def test_euler_takes_the_place_of_every_flow_scheduler_and_keeps_its_shift(own: dict[str, object]) -> None:
    euler = make_sampler(own, "euler")
    assert (type(euler).__name__, euler.config.shift) == ("FlowMatchEulerDiscreteScheduler", 3.0)


@pytest.mark.parametrize("name", ["DPMSolverMultistep", "UniPCMultistep"])
def test_solvers_shift_a_flow_schedule_by_the_number_of_tokens(name: str) -> None:
    """1024 tokens shift by mu = 0.63, and the second of two levels, one half, to e^mu / (1 + e^mu)."""
    config = {"_class_name": f"{name}Scheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    sampler = Sampler(FAMILY, make_sampler({**config, "use_dynamic_shifting": True}), 2, tokens=1024)
    shift = np.exp(0.5 + 0.65 * (1024 - 256) / (4096 - 256))
    assert sampler._fresh().sigmas[1].item() == pytest.approx(shift / (1 + shift), abs=1e-3)


@pytest.mark.parametrize(
    "own", ["CMStochasticIterativeScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "UnCLIPScheduler"]
)
def test_a_schedule_without_betas_takes_no_sampler_with_betas(own: str) -> None:
    for name in ("ddim", "ddpm", "plms", "dpmsolver", "euler", "euler_ancestral", "lcm"):
        with pytest.raises(UsageError, match=f"that of {own}, which has none"):
            make_sampler({"_class_name": own}, name)
    assert type(make_sampler({"_class_name": own})).__name__ == own


def test_a_learned_variance_is_that_of_the_network_with_the_condition() -> None:
    class Double(nn.Module):
        def forward(self, sample, timestep, class_labels, return_dict):
            value = class_labels.view(-1, 1, 1, 1).float().expand_as(sample)
            return (torch.cat([value, value], 1),)

    config = {**LINEAR, "_class_name": "DDPMScheduler", "clip_sample": False}
    scheduler = make_sampler(config, None, SchedulerChoices(variance="learned_range"))
    sampler = Sampler(FAMILY, scheduler, 2, guidance=3.0)
    noise = initial_noise((1, 4, 4), range(1), 0)
    given, null = {"class_labels": torch.tensor([0.5])}, {"class_labels": torch.tensor([-0.5])}
    found = sampler.run(Double(), noise, given, [7], null=null)
    scheduler.set_timesteps(2)
    x, generator = noise, [torch.Generator().manual_seed(7)]
    output = torch.cat([torch.full_like(x, -0.5 + 3 * 1.0), torch.full_like(x, 0.5)], 1)
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, generator=generator).prev_sample
    torch.testing.assert_close(found, x)

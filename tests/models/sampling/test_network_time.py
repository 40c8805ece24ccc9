"""Time as networks receive it: what diffusers' pipelines pass, or what the user says."""

from __future__ import annotations

import inspect

import pytest
import torch

from dqtool.errors import UsageError
from dqtool.models.families import FAMILIES
from dqtool.models.sampling import network_time
from dqtool.models.sampling.network_time import NetworkTime
from dqtool.models.sampling.sampler import Sampler, make_sampler

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
T = torch.tensor([1000.0, 750.0, 1.0])


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("AuraFlowTransformer2DModel", {}, [1.0, 0.75, 0.001]),
        ("QwenImageTransformer2DModel", {}, [1.0, 0.75, 0.001]),
        ("Lumina2Transformer2DModel", {}, [0.0, 0.25, 0.999]),
        ("ZImageTransformer2DModel", {}, [0.0, 0.25, 0.999]),
        ("GlmImageTransformer2DModel", {}, [999.0, 749.0, 0.0]),
        ("SanaTransformer2DModel", {"timestep_scale": 0.5}, [500.0, 375.0, 0.5]),
        ("WanTransformer3DModel", {}, [1000.0, 750.0, 1.0]),
    ],
)
def test_a_class_tells_what_its_pipeline_passes(name: str, config: dict[str, float], expected: list[float]) -> None:
    time = network_time.network_time(name, config, FLOW, None)
    torch.testing.assert_close(time.given(T), torch.tensor(expected))
    assert time.given(torch.tensor([500])).dtype == torch.float32
    assert NetworkTime(**time.record()) == time


def test_a_class_that_does_not_tell_is_asked_for() -> None:
    for name, config in (("CosmosTransformer3DModel", {}), ("NewTransformer2DModel", {}), SPRINT):
        with pytest.raises(UsageError, match="--time-scale"):
            network_time.network_time(name, config, FLOW, None)
        assert network_time.network_time(name, config, FLOW, 0.001).given(T)[0] == 1
        assert network_time.network_time(name, config, FLOW, -0.001).given(T)[0] == 0
    assert network_time.network_time("NewUNet", {}, {"_class_name": "DDIMScheduler"}, None).given(T)[0] == 1000
    with pytest.raises(UsageError, match="no steps"):
        network_time.network_time("NewUNet", {}, None, 0.0)


SPRINT = ("SanaTransformer2DModel", {"guidance_embeds": True})


def test_the_listed_classes_are_those_of_diffusers_pipelines() -> None:
    """Every listed name is a class, and the pipelines' sources hold the expressions that the lists stand for."""
    import diffusers

    for names in (network_time.DIVIDED, network_time.REVERSED, network_time.NEGATED, network_time.LINEAR_SIGMAS):
        assert all(hasattr(diffusers, name) for name in names)
    for pipeline, text in (
        ("AuraFlowPipeline", "t / 1000"),
        ("ChromaPipeline", "timestep / 1000"),
        ("QwenImagePipeline", "timestep / 1000"),
        ("Lumina2Pipeline", "1 - t / self.scheduler.config.num_train_timesteps"),
        ("ZImagePipeline", "(1000 - timestep) / 1000"),
        ("ZImagePipeline", "noise_pred = -noise_pred"),
        ("GlmImagePipeline", "t.expand(latents.shape[0]) - 1"),
        ("SanaPipeline", "timestep * self.transformer.config.timestep_scale"),
    ):
        assert text in inspect.getsource(inspect.getmodule(getattr(diffusers, pipeline)))


def test_a_turned_sign_reaches_the_scheduler() -> None:
    class One(torch.nn.Module):
        def forward(self, sample, timestep, return_dict):
            return (torch.ones_like(sample),)

    noise = torch.zeros(1, 1, 2, 2)
    samplers = [
        Sampler(FAMILIES["UNet2DModel"], make_sampler(FLOW), 2, time=NetworkTime(negated=n)) for n in (False, True)
    ]
    images = [sampler.run(One(), noise, {}) for sampler in samplers]
    assert bool((images[0] < 0).all())
    torch.testing.assert_close(images[0], -images[1])

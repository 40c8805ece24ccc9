"""Configs that are wrong in any way end with a message that names the key, and cost next to nothing."""

from __future__ import annotations

import contextlib
import inspect
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from helpers import NETWORK, SCHEDULER
from timing import within

from dqtool.errors import ArtifactError, DqtoolError, EnvironmentFault, UsageError
from dqtool.models.architectures import ARCHITECTURES
from dqtool.models.config_schema import check_network_config, check_scheduler_config, diffusers_class
from dqtool.models.families import FAMILIES, family_of
from dqtool.models.networks.loading import build_network
from dqtool.models.sampling.sampler import SAMPLERS, Sampler, make_sampler

WRONG = (None, True, "x", "", [], {}, [[1]], {"a": 1}, 0, -1, -(10**12), 10**12, 0.5, 1e300, float("nan"), float("inf"))
UNET = {**NETWORK, "_class_name": "UNet2DModel"}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_published_configs_pass(name: str):
    wanted = ARCHITECTURES[name]
    assert family_of(wanted.class_name, "here", wanted.config).class_name == wanted.class_name


def test_defaults_of_every_scheduler_and_family_pass():
    for name in dir(diffusers):
        if name.endswith("Scheduler"):
            try:
                cls = diffusers_class(name, "SchedulerMixin", "here")
            except DqtoolError:  # classes of packages that are not installed
                continue
            check_scheduler_config(cls, defaults(cls), "here")
    for family in FAMILIES.values():
        cls = getattr(diffusers, family.class_name)
        check_network_config(cls, defaults(cls), "here")


def defaults(cls: type) -> dict[str, Any]:
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


@pytest.mark.parametrize("class_name", sorted(FAMILIES))
def test_wrong_values_of_a_network(class_name: str):
    parameters = list(inspect.signature(getattr(diffusers, class_name).__init__).parameters)[1:]
    family = FAMILIES[class_name]
    for key in parameters:
        for value in WRONG:

            def check(config: dict[str, Any]) -> None:
                with contextlib.suppress(ArtifactError), torch.device("meta"):
                    family.check(config)

            within(1, partial(check, {"sample_size": 8, "in_channels": 4, key: value}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers_per_block", 2000),
        ("layers_per_block", 10**9),
        ("block_out_channels", [8] * 2000),
        ("block_out_channels", [8, 0]),
        ("norm_num_groups", 0),
        ("norm_num_groups", 3),
        ("norm_eps", float("nan")),
        ("attention_head_dim", 0),
        ("down_block_types", ["Nothing", "DownBlock2D"]),
        ("act_fn", "nothing"),
        ("sample_size", 10**6),
        ("sample_size", [8, 8, 8]),
        ("in_channels", None),
        ("in_channels", [1]),
        ("time_embedding_type", "nothing"),
    ],
)
def test_networks_that_can_not_be_built(key: str, value: Any):
    def build() -> None:
        with pytest.raises(ArtifactError, match="config"):
            build_network("UNet2DModel", {**UNET, key: value}, {}, "here")

    within(1, build)


def test_a_message_names_the_key_and_what_it_must_be():
    with pytest.raises(ArtifactError, match="layers_per_block must be a whole number"):
        family_of("UNet2DModel", "here", {**UNET, "layers_per_block": "2"})
    with pytest.raises(ArtifactError, match="beta_schedule must be one of linear, scaled_linear, squaredcos_cap_v2"):
        make_sampler({"_class_name": "DDIMScheduler", "beta_schedule": "nothing"})


@pytest.mark.parametrize("name", ["DDPMScheduler", *sorted(set(SAMPLERS.values())), "FlowMatchEulerDiscreteScheduler"])
def test_wrong_values_of_a_scheduler(name: str):
    family = FAMILIES["UNet2DModel"]
    for key in [*inspect.signature(getattr(diffusers, name).__init__).parameters][1:]:
        for value in WRONG:

            def make(config: dict[str, Any]) -> None:
                with contextlib.suppress(ArtifactError, UsageError):
                    assert len(Sampler(family, make_sampler(config), 4).timesteps())

            within(1, partial(make, {**SCHEDULER, "_class_name": name, key: value}))


@pytest.mark.parametrize(
    "name", ["UNet2DModel", "nothing", "os", "SchedulerMixin.__init__", "", "DiffusionPipeline", 5]
)
def test_schedulers_that_are_none(name: Any):
    def make() -> None:
        with pytest.raises(ArtifactError, match="scheduler"):
            make_sampler({"_class_name": name})

    within(1, make)


def test_a_scheduler_whose_package_is_missing_is_of_the_environment():
    with pytest.raises(EnvironmentFault, match="torchsde"):
        make_sampler({"_class_name": "DPMSolverSDEScheduler"})


@pytest.mark.parametrize("name", sorted(set(SAMPLERS)))
def test_more_steps_than_the_schedule_has(name: str):
    family = FAMILIES["UNet2DModel"]
    for steps in (1001, 0, -1, 10**9):
        with pytest.raises(UsageError, match="steps"):
            Sampler(family, make_sampler(SCHEDULER, name), steps)
    with pytest.raises(UsageError, match="--eta"):
        Sampler(family, make_sampler(SCHEDULER, name), 4, float("inf"))


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_that_are_no_floats(dtype: torch.dtype):
    state = FAMILIES["UNet2DModel"].build(UNET).state_dict()
    state["conv_in.weight"] = state["conv_in.weight"].to(dtype)
    with pytest.raises(ArtifactError, match=r"conv_in\.weight.*floats"):
        build_network("UNet2DModel", UNET, state, "here")

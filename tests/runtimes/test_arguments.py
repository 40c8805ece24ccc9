"""Uses of a network in pipelines beside calls: residuals from other networks, FreeU, caches; the same on integers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from families import component_directory
from synthetic import synthetic_network
from torch import Tensor, nn

from dqtool.models.families import family_of
from dqtool.nn.call_lock import one_call_at_a_time
from dqtool.runtimes.cpu import convert

DOWN = ((2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 4, 4), (2, 16, 4, 4))
MID = (2, 16, 4, 4)
ADAPTER = ((2, 8, 4, 4), (2, 16, 4, 4))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`pair(name)`: the simulated network of that family and the one on integers, fresh."""
    known: dict[str, nn.Module] = {}

    def networks(name: str) -> tuple[Any, Any]:
        if name not in known:
            path: Path = component_directory(name, tmp_path_factory.mktemp(name) / "model")
            known[name] = synthetic_network(str(path), "4/4", steps=3)
        return one_call_at_a_time(copy.deepcopy(known[name])), convert(copy.deepcopy(known[name]))

    return networks


def call(network: Any, row: int = 1, **extra: Any) -> Tensor:
    """The network's answer at a step of the table."""
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    example = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=2)
    step = {"timestep": network.timesteps[row].expand(2), "return_dict": False}
    with torch.no_grad():
        result: Tensor = network(**example | step | extra)[0]
    return result


def assert_close(found: Tensor, expected: Tensor) -> None:
    """Up to the last bits of float32."""
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random ones of these shapes."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("mixed", [False, True])
def test_residuals_of_a_controlnet(pair: Any, mixed: bool) -> None:
    simulated, integer = pair("unet2d_condition")
    extra: dict[str, Any] = {
        "down_block_additional_residuals": tuple(tensors(*DOWN)),
        "mid_block_additional_residual": tensors(MID)[0],
    }
    if mixed:
        extra["timestep"] = simulated.timesteps[:2]
    expected = call(simulated, **extra)
    assert_close(call(integer, **extra), expected)
    assert float((call(simulated) - expected).norm() / expected.norm()) > 0.1


def test_residuals_of_an_adapter(pair: Any) -> None:
    simulated, integer = pair("unet2d_condition")
    expected = call(simulated, down_intrablock_additional_residuals=tensors(*ADAPTER))  # the call empties the list
    assert_close(call(integer, down_intrablock_additional_residuals=tensors(*ADAPTER)), expected)
    assert float((call(simulated) - expected).norm() / expected.norm()) > 0.1


def test_attention_arguments_that_default_processors_ignore(pair: Any) -> None:
    simulated, integer = pair("unet2d_condition")
    extra = {"cross_attention_kwargs": {"scale": 0.5}}
    assert torch.equal(call(simulated, **extra), call(simulated))
    assert torch.equal(call(integer, **extra), call(integer))


def test_freeu_on_and_off(pair: Any) -> None:
    simulated, integer = pair("unet2d_condition")
    plain = call(integer)
    for network in (simulated, integer):
        network.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)
    expected = call(simulated)
    assert_close(call(integer), expected)
    assert float((plain - expected).norm() / expected.norm()) > 0.1
    integer.disable_freeu()
    assert torch.equal(call(integer), plain)


def broadcast() -> Any:
    """Attention of every second step."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: 500,
    )


@pytest.mark.parametrize("config", [lambda: FirstBlockCacheConfig(threshold=10.0), broadcast])
def test_caches_over_steps(pair: Any, config: Any) -> None:
    results = []
    for network in pair("flux"):
        plain = call(network)
        network.enable_cache(config())
        with network.cache_context("cond"):
            results.append([call(network, row) for row in range(3)])
        network.disable_cache()
        assert not torch.equal(results[-1][1], plain)  # a part of the step before
        assert torch.equal(call(network), plain)
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected)

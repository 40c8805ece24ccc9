"""Quantized networks under `torch.compile` and `torch.export`: one graph for all steps, and the numbers of the eager network."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import small_networks
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dqtool.models.families import family_of
from dqtool.runtimes.cpu.onednn_product import OnednnProduct
from dqtool.runtimes.cpu.op_arguments import runs_of_rows


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """See `small_networks`."""
    return small_networks(tmp_path_factory)


def arguments(network: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Arguments of a call without its timestep."""
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    example = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=batch)
    return {key: value for key, value in example.items() if key != "timestep"} | {"return_dict": False}


def timesteps(network: nn.Module, batch: int = 2) -> list[Tensor]:
    """Return the timesteps of the table as pipelines pass them, one for each sample."""
    return [t.expand(batch).clone() for t in network.timesteps]


@pytest.mark.parametrize(
    ("name", "form", "backend"),
    [
        ("dit", "hub", "eager"),
        ("dit", "integer", "aot_eager"),
        ("unet2d_condition", "integer", "eager"),
    ],
)
@torch.no_grad()
def test_one_graph_serves_all_steps(made: Any, name: str, form: str, backend: str) -> None:
    torch._dynamo.reset()
    network = made(name, form)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(copy.deepcopy(network), backend=counter, fullgraph=True)
    given = arguments(network)
    steps = timesteps(network)
    for timestep in [*steps, *steps, network.timesteps[:2].clone()]:  # the last is a batch of mixed steps
        expected = network(timestep=timestep, **given)[0]
        assert torch.allclose(compiled(timestep=timestep, **given)[0], expected, atol=1e-5), timestep
    if form == "integer":  # codes hold no NaN: it must come out, in its own sample alone
        expected = network(timestep=steps[0], **given)[0]
        given[family_of(type(network).__name__, "test").sample][1, 0, 0, 0] = torch.nan
        result = compiled(timestep=steps[0], **given)[0]
        assert result[1].isnan().all()
        assert torch.allclose(result[0], expected[0], atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_network_that_ran_before_compiles_to_the_same(made: Any) -> None:
    torch._dynamo.reset()
    network = made("dit", "integer")
    given = arguments(network)
    expected = [network(timestep=t, **given)[0] for t in timesteps(network)]
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    for t, wanted in zip(timesteps(network), expected, strict=True):
        assert torch.allclose(compiled(timestep=t, **given)[0], wanted, atol=1e-5)


@torch.no_grad()
def test_compiled_blocks_follow_the_step_of_the_network(made: Any) -> None:
    torch._dynamo.reset()
    network, plain = (made("unet2d_condition", "integer") for _ in range(2))
    given = arguments(network)
    network.compile_repeated_blocks(fullgraph=True, backend="eager")
    for t in timesteps(network):
        assert torch.allclose(network(timestep=t, **given)[0], plain(timestep=t, **given)[0], atol=1e-5)


@pytest.mark.parametrize(("name", "form"), [("dit", "hub"), ("unet2d", "integer")])
@torch.no_grad()
def test_an_exported_program_is_the_network(made: Any, tmp_path: Path, name: str, form: str) -> None:
    network = made(name, form)
    given = arguments(network)
    first, *others = timesteps(network)
    program = torch.export.export(copy.deepcopy(network), (), kwargs={"timestep": first, **given})
    torch.export.save(program, tmp_path / "network.pt2")
    loaded = torch.export.load(tmp_path / "network.pt2").module()
    for t in (first, *others):
        expected = network(timestep=t, **given)[0]
        for module in (program.module(), loaded):
            assert torch.allclose(module(timestep=t, **given)[0], expected, atol=1e-5)


@torch.no_grad()
def test_without_own_kernels(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setenv("DQTOOL_KERNELS", "0")
    from dqtool.runtimes.cpu import library

    library.has_products.cache_clear()
    library.has_vnni.cache_clear()
    try:
        network = made("dit", "integer")
        assert any(isinstance(module, OnednnProduct) for module in network.modules())
        given = arguments(network)
        compiled = torch.compile(copy.deepcopy(network), backend="eager", fullgraph=True)
        for t in [*timesteps(network), network.timesteps[1:].clone()]:
            expected = network(timestep=t, **given)[0]
            assert torch.allclose(compiled(timestep=t, **given)[0], expected, atol=1e-5)
    finally:
        library.has_products.cache_clear()
        library.has_vnni.cache_clear()


def test_rows_run_from_sample_to_sample() -> None:
    assert list(runs_of_rows(torch.tensor([2, 2, 0]), 6)) == [(0, 4, 2), (4, 6, 0)]
    assert list(runs_of_rows(torch.tensor([1]), 3)) == [(0, 3, 1)]
    assert list(runs_of_rows(torch.tensor([1, 2]), 3)) == [(0, 3, 1)]  # an input without a batch

"""The tables that correct a quantized network's predictions: applied once, to the step at hand, in every form of output."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_pipeline
from synthetic import synthetic_network
from torch import Tensor, nn

from dqtool.core.detail import detail
from dqtool.models.families import FAMILIES
from dqtool.nn.prediction import (
    ALWAYS,
    OF_IMAGES,
    PredictionTables,
    attach_prediction,
    corrected,
    row_shapes,
    same_channels,
)
from dqtool.nn.surgery import packed_state, steps_of
from dqtool.nn.traceable import TraceableNetwork
from dqtool.runtimes.cpu import available, convert


@pytest.fixture
def plain(tmp_path: Path) -> nn.Module:
    """Timesteps 0, 50, ..., 200."""
    return synthetic_network(str(tiny_pipeline(tmp_path / "tiny")), "4/4")


@pytest.fixture(params=[ALWAYS, OF_IMAGES], ids=["scale and bias", "all"])
def tables(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: 1 + torch.randn(5, 1, 1, 1, generator=generator) for name in request.param}


def undo(prediction: Tensor, x: Tensor, tables: dict[str, Tensor], rows: list[int]) -> Tensor:
    """Undo the correction by its definition: a convolution with the binomial kernel on a replicated border."""
    at = {name: table[rows] for name, table in tables.items()}
    expected = prediction * at["scale"] + at["bias"]
    if "detail" not in at:
        return expected
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    fine = [each - F.conv2d(F.pad(each, (1, 1, 1, 1), mode="replicate"), kernel) for each in (prediction, x)]
    return expected + x * at["input"] + fine[0] * at["detail"] + fine[1] * at["input_detail"]


def test_only_images_have_tables_for_detail() -> None:
    assert row_shapes((4, 1, 1)) == dict.fromkeys(OF_IMAGES, (4, 1, 1))
    assert row_shapes((1, 64)) == dict.fromkeys(ALWAYS, (1, 64))


def test_a_learned_variance_and_conditions_in_the_input_are_left_alone() -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(same_channels(x, 3), x[:, :3])
    assert torch.equal(same_channels(x, 8), torch.cat([x, torch.zeros_like(x)], 1))
    tables = {name: torch.zeros(8, 1, 1) for name in OF_IMAGES}
    tables["scale"] += 1
    tables["detail"][:4], tables["input_detail"][:4] = 0.5, 0.25
    prediction = torch.cat([x.flip(0), x], 1)
    result = corrected(prediction, x, tables)
    assert torch.equal(result[:, 4:], x)
    assert torch.allclose(result[:, :4], x.flip(0) + 0.5 * detail(x.flip(0)) + 0.25 * detail(x), atol=1e-6)


def test_tuples_and_outputs_are_corrected_by_the_step_of_each_sample(
    plain: nn.Module, tables: dict[str, Tensor]
) -> None:
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    network = copy.deepcopy(plain)
    attach_prediction(network, tables)
    for timestep, rows in ((torch.tensor(50), [1]), (torch.tensor([200, 0]), [4, 0])):
        expected = undo(plain(x, timestep).sample, x, tables, rows)
        assert torch.allclose(network(x, timestep).sample, expected, atol=1e-5)
        assert torch.allclose(network(sample=x, timestep=timestep, return_dict=False)[0], expected, atol=1e-5)


def test_tables_that_are_attached_again_take_the_place_of_the_first(plain: nn.Module) -> None:
    first = {"scale": torch.full((5, 1, 1, 1), 2.0), "bias": torch.full((5, 1, 1, 1), 0.5)}
    x = torch.ones(1, 1, 8, 8)
    uncorrected = plain(x, 50).sample
    attach_prediction(plain, first)
    once = copy.deepcopy(plain)
    attach_prediction(plain, {"scale": torch.ones(5, 1, 1, 1), "bias": torch.zeros(5, 1, 1, 1)})
    assert torch.equal(plain(x, 50).sample, uncorrected)
    assert torch.equal(once(x, 50).sample, uncorrected * 2 + 0.5)  # the copy kept its own


def test_half_precision_networks_keep_their_type(plain: nn.Module, tables: dict[str, Tensor]) -> None:
    attach_prediction(plain, tables)
    x = torch.ones(1, 1, 8, 8).bfloat16()
    correction: PredictionTables = plain.prediction  # type: ignore[assignment]
    assert correction(x, x, steps_of(plain).rows).dtype == torch.bfloat16


def test_the_state_has_them_beside_the_other_tables(plain: nn.Module, tables: dict[str, Tensor]) -> None:
    attach_prediction(plain, tables)
    state = packed_state(plain)
    assert {n for n in state if n.startswith("prediction.")} == {f"prediction.{name}" for name in tables}
    assert all(torch.equal(state[f"prediction.{name}"], table) for name, table in tables.items())


def test_lowered_and_integer_networks_correct_as_the_packed_one_does(
    plain: nn.Module, tables: dict[str, Tensor]
) -> None:
    network = copy.deepcopy(plain)
    attach_prediction(network, tables)
    example = FAMILIES["UNet2DModel"].example(plain.config, batch=2)
    traceable = [TraceableNetwork(copy.deepcopy(n), example).eval() for n in (plain, network)]
    x = example["sample"]
    for timestep, rows in ((torch.tensor([50.0]), [1]), (torch.tensor([200.0, 0.0]), [4, 0])):
        without, with_tables = (n(x, timestep)[0] for n in traceable)
        assert torch.allclose(with_tables, undo(without, x, tables, rows), atol=1e-5)
        if available() is None:
            without, with_tables = (
                convert(copy.deepcopy(n))(x, timestep.expand(2), return_dict=False)[0] for n in (plain, network)
            )
            assert torch.allclose(with_tables, undo(without, x, tables, rows), atol=1e-5)

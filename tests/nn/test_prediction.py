"""The tables that correct a quantized network's predictions: applied once, to the step at hand, in every form of output."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from helpers import tiny_pipeline
from synthetic import synthetic_network
from torch import Tensor, nn

from dqtool.models.families import FAMILIES
from dqtool.nn.lowered import LoweredNetwork
from dqtool.nn.prediction import attach_prediction
from dqtool.nn.surgery import packed_state, steps_of
from dqtool.runtimes.onednn import available, convert


@pytest.fixture
def plain(tmp_path: Path) -> nn.Module:
    """Timesteps 0, 50, ..., 200."""
    return synthetic_network(str(tiny_pipeline(tmp_path / "tiny")), "4/4")


@pytest.fixture
def tables() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return 1 + torch.rand(5, 1, 1, 1, generator=generator), torch.randn(5, 1, 1, 1, generator=generator)


def test_tuples_and_outputs_are_corrected_by_the_step_of_each_sample(
    plain: nn.Module, tables: tuple[Tensor, Tensor]
) -> None:
    scale, bias = tables
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    corrected = copy.deepcopy(plain)
    attach_prediction(corrected, scale, bias)
    for timestep, rows in ((torch.tensor(50), [1]), (torch.tensor([200, 0]), [4, 0])):
        expected = plain(x, timestep).sample * scale[rows] + bias[rows]
        assert torch.equal(corrected(x, timestep).sample, expected)
        assert torch.equal(corrected(x, timestep, return_dict=False)[0], expected)


def test_tables_that_are_attached_again_take_the_place_of_the_first(
    plain: nn.Module, tables: tuple[Tensor, Tensor]
) -> None:
    scale, bias = tables
    x = torch.ones(1, 1, 8, 8)
    uncorrected = plain(x, 50).sample
    attach_prediction(plain, scale, bias)
    once = copy.deepcopy(plain)
    attach_prediction(plain, torch.ones_like(scale), torch.zeros_like(bias))
    assert torch.equal(plain(x, 50).sample, uncorrected)
    assert torch.equal(once(x, 50).sample, uncorrected * scale[1] + bias[1])  # the copy kept its own


def test_half_precision_networks_keep_their_type(plain: nn.Module, tables: tuple[Tensor, Tensor]) -> None:
    attach_prediction(plain, *tables)
    x = torch.ones(1, 1, 8, 8)
    prediction = plain.prediction(x.bfloat16(), steps_of(plain).rows)
    assert prediction.dtype == torch.bfloat16


def test_the_state_has_them_beside_the_other_tables(plain: nn.Module, tables: tuple[Tensor, Tensor]) -> None:
    attach_prediction(plain, *tables)
    state = packed_state(plain)
    assert torch.equal(state["prediction.scale"], tables[0])
    assert torch.equal(state["prediction.bias"], tables[1])


def test_lowered_and_integer_networks_correct_as_the_packed_one_does(
    plain: nn.Module, tables: tuple[Tensor, Tensor]
) -> None:
    corrected = copy.deepcopy(plain)
    attach_prediction(corrected, *tables)
    scale, bias = tables
    example = FAMILIES["UNet2DModel"].example(plain.config, batch=2)
    lowered = [LoweredNetwork(copy.deepcopy(n), example).eval() for n in (plain, corrected)]
    x = example["sample"]
    for timestep, rows in ((torch.tensor([50.0]), [1]), (torch.tensor([200.0, 0.0]), [4, 0])):
        without, with_tables = (network(x, timestep)[0] for network in lowered)
        assert torch.allclose(with_tables, without * scale[rows] + bias[rows], atol=1e-5)
        if available() is None:
            without, with_tables = (
                convert(copy.deepcopy(n))(x, timestep.expand(2), return_dict=False)[0] for n in (plain, corrected)
            )
            assert torch.allclose(with_tables, without * scale[rows] + bias[rows], atol=1e-5)

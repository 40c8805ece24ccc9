"""Adam over step tables: rows of absent steps and their moments do not change."""

from __future__ import annotations

import torch
from helpers import T, quantized_conv
from torch import nn

from dqtool.training.optimizer import QuantAdam, cosine
from dqtool.training.options import Rates


def run(layer: nn.Module, optimizer: QuantAdam, rows: list[int]) -> None:
    torch.manual_seed(len(rows))
    index = torch.tensor(rows)
    layer.steps.select(index)
    x = torch.randn(len(rows), 3, 5, 5)
    optimizer.zero_grad()
    layer(x).square().sum().backward()
    present = torch.zeros(T, dtype=torch.bool)
    present[index] = True
    optimizer.step(present)


def test_absent_steps_are_left_untouched_bitwise() -> None:
    layer = quantized_conv()
    optimizer = QuantAdam(layer, Rates())
    run(layer, optimizer, [0, 1, 2, 3, 4, 5])  # every step has momentum now
    before = layer.input_scale.detach().clone(), layer.input_zero_point.detach().clone()
    run(layer, optimizer, [1, 4, 4])
    for old, new in zip(before, (layer.input_scale, layer.input_zero_point), strict=True):
        changed = (old != new.detach()).tolist()
        assert not any(changed[step] for step in (0, 2, 3, 5))
    assert bool((before[0] != layer.input_scale.detach())[[1, 4]].all())


def test_a_step_has_the_size_of_its_rate_in_the_units_of_what_it_moves() -> None:
    layer = quantized_conv()
    rates = Rates(weight=0.1, table_scale=0.01)
    weight, table = layer.weight.detach().clone(), layer.input_scale.detach().clone()
    optimizer = QuantAdam(layer, rates)
    run(layer, optimizer, list(range(T)))
    moved = (layer.weight.detach() - weight).abs()
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 0.1 * 0.05), rtol=1e-3, atol=1e-6)
    ratio = (layer.input_scale.detach() / table).log().abs()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.01), rtol=1e-3, atol=1e-6)


def test_zero_points_stay_in_range_and_scales_positive() -> None:
    layer = quantized_conv()
    optimizer = QuantAdam(layer, Rates(zero_point=50.0, table_scale=5.0))
    for _ in range(3):
        run(layer, optimizer, list(range(T)))
    assert bool(((layer.input_zero_point >= 0) & (layer.input_zero_point <= 15)).all())
    assert bool((layer.input_scale > 0).all())


def test_release_returns_ordinary_parameters() -> None:
    layer = quantized_conv()
    optimizer = QuantAdam(layer, Rates())
    values = layer.input_scale.detach().clone()
    optimizer.release()
    assert layer.input_scale.is_contiguous()
    assert torch.equal(values, layer.input_scale.detach())


def test_cosine_goes_from_one_to_its_floor() -> None:
    assert cosine(0, 10) == 1
    assert cosine(10, 10) < 1e-12
    assert abs(cosine(10, 10, 0.1) - 0.1) < 1e-12

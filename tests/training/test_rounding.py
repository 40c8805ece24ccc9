"""AdaRound's weights stay between their neighbouring codes, and the regulariser decides between the two."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from helpers import quantized_conv

from dqtool.core.affine import levels
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.surgery import quant_layers
from dqtool.training.data import DistillationTask
from dqtool.training.methods import METHODS
from dqtool.training.rounding import (
    Annealing,
    SoftRounding,
    float_activations,
    learn_rounding,
    merge_adapters,
    rounding_penalty,
)


def floor_codes(layer: FakeQuantLayer) -> torch.Tensor:
    """Return the code below each weight, clipped to the grid."""
    shape = (-1, *(1,) * (layer.weight.dim() - 1))
    zero = layer.weight_zero_point.view(shape).round()
    floor = (layer.weight / layer.weight_scale.view(shape)).floor()
    return torch.minimum(torch.maximum(floor, layer.low - zero), levels(layer.bits.weight) - zero)


def test_no_weight_moves_by_more_than_one_step(task: DistillationTask, silent: Any) -> None:
    before = quant_layers(copy.deepcopy(task.student))
    # A rate at which unbounded weights would move far.
    method = METHODS["adaround"]
    method.train(task, replace(method.options(), iters=10, batch_size=8, round_rate=3.0), silent.bars)
    moved = 0
    for name, layer in quant_layers(task.student).items():
        assert isinstance(layer, FakeQuantLayer)
        old = before[name]
        assert torch.equal(layer.weight_scale, old.weight_scale)
        assert torch.equal(layer.weight_zero_point, old.weight_zero_point)
        codes = layer.quantized_weight() / layer.weight_scale.view(-1, *(1,) * (layer.weight.dim() - 1))
        up = (codes - floor_codes(old)).round()
        assert set(up.unique().tolist()) <= {0.0, 1.0}, name
        moved += int((layer.quantized_weight() != old.quantized_weight()).sum())
        assert old.bias is None or torch.equal(old.bias, layer.bias)
    assert moved


def test_at_first_nothing_is_changed_and_hard_rounding_is_to_nearest() -> None:
    layer = quantized_conv()
    nearest = layer.quantized_weight().detach()
    (rounding,) = learn_rounding([layer])
    inside = (layer.weight.detach() - nearest).abs() <= 0.5 * 0.05 + 1e-6
    torch.testing.assert_close(layer.quantized_weight()[inside], layer.weight[inside], rtol=0, atol=1e-5)
    assert bool(((rounding.up() > 0) | (rounding.v < 0)).all())
    merge_adapters(layer)
    assert layer.adapter is None
    torch.testing.assert_close(layer.quantized_weight(), nearest, rtol=0, atol=1e-6)


def test_the_regulariser_is_none_at_the_ends_and_annealed() -> None:
    layer = quantized_conv()
    rounding = SoftRounding(layer)
    with torch.no_grad():
        rounding.v.fill_(50.0)
    assert rounding_penalty([rounding], 2.0).item() == 0
    with torch.no_grad():
        rounding.v.fill_(0.0)
    assert rounding_penalty([rounding], 2.0).item() == rounding.v.numel()
    course = Annealing()
    assert course.beta(19, 100) is None
    assert course.beta(20, 100) == 20
    assert course.beta(100, 100) == 2


def test_activations_can_be_float_for_a_while() -> None:
    layer = quantized_conv()
    x = torch.randn(2, 3, 5, 5)
    before = layer(x)
    with float_activations(layer):
        assert torch.equal(layer.quantize_input(x), x)
    assert torch.equal(layer(x), before)

"""Low-rank branches: the split of a weight, the layers that carry one, their size and cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dqtool.artifacts.records import LayerRecord
from dqtool.core.affine import fake_quantize, search_weight
from dqtool.core.bits import LayerBits
from dqtool.core.cost import bops
from dqtool.core.dilation import broadcast_scale
from dqtool.core.quantization import QuantizationSpec
from dqtool.errors import UsageError
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan, assign_bits, require_branches, with_branches
from dqtool.nn.branch import LowRankBranch, merge_branches
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.low_rank import attach_low_rank, split_weight
from dqtool.nn.packed_layer import PackedLayer, packed_shapes
from dqtool.nn.steps import StepIndex

LAYERS = {
    "linear": (nn.Linear(24, 20), (5, 24)),
    "1x1": (nn.Conv2d(24, 20, 1), (2, 24, 5, 6)),
    "3x3": (nn.Conv2d(24, 20, 3, padding=1), (2, 24, 5, 6)),
    "strided": (nn.Conv2d(24, 20, 3, stride=2, padding=1, dilation=2), (2, 24, 9, 8)),
}


def info_of(layer: nn.Module, macs: int = 0) -> LayerInfo:
    """Return what a trace says of a layer called `0`."""
    kind = "linear" if isinstance(layer, nn.Linear) else "conv2d"
    return LayerInfo("0", kind, tuple(layer.weight.shape), macs, bias=True)  # type: ignore[arg-type]


def branched(layer: nn.Module, rank: int, dilation: Tensor | None = None) -> FakeQuantLayer:
    """Return the layer at 4/4 with a branch and without quantizers."""
    made = FakeQuantLayer(layer, LayerBits(4, 4), StepIndex(torch.zeros(1)))
    if dilation is not None:
        made.dilation = dilation
        made.weight.data *= broadcast_scale(dilation, made.weight, 1)
    network = nn.Sequential(made)
    attach_low_rank(network, with_branches([LayerPlan(info_of(layer), LayerBits(4, 4))], rank))
    return made


@pytest.mark.parametrize("dilated", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_without_quantizers_a_branched_layer_is_the_float_layer(name: str, dilated: bool) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    dilation = torch.rand(24) * 30 + 0.1 if dilated else None
    made = branched(layer, 4, dilation)
    x = torch.randn(shape)
    with torch.no_grad():
        expected, got = layer(x), made(x)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    assert made.low_rank is not None
    assert made.low_rank.down.dtype == made.low_rank.up.dtype == torch.float16
    torch.testing.assert_close(made.float_weight(), layer.weight, rtol=1e-4, atol=1e-6)


def test_the_branch_takes_the_large_directions_and_lowers_the_rounding_error() -> None:
    torch.manual_seed(0)
    weight = torch.randn(32, 48) * 0.05 + torch.randn(32, 3) @ torch.randn(3, 48)

    def error(values: Tensor) -> float:
        scale, zero_point = search_weight(values, 4, symmetric=False)
        return float((fake_quantize(values, scale[:, None], zero_point[:, None], 4) - values).square().sum())

    down, up = split_weight(weight, None, 4, 4)
    residual = weight - up.float() @ down.float()
    assert error(residual) < 0.01 * error(weight)
    plain = torch.linalg.svd(weight)
    svd = weight - (plain.U[:, :4] * plain.S[:4]) @ plain.Vh[:4]
    assert error(residual) <= 1.001 * error(svd)  # float16 factors aside


def test_factors_of_extreme_dilations_stay_in_the_range_of_float16() -> None:
    torch.manual_seed(0)
    weight, dilation = torch.randn(16, 24), torch.logspace(-4, 4, 24)
    down, up = split_weight(weight * dilation, dilation, 4, 4)
    assert bool(torch.isfinite(down).all() and torch.isfinite(up).all())
    assert float(down.float().abs().max() / up.float().abs().max()) == pytest.approx(1, rel=1)


@pytest.mark.parametrize("name", LAYERS)
def test_the_packed_layer_computes_what_the_trained_one_does(name: str) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    made = branched(layer, 4, torch.rand(24) + 1)
    scale, zero_point = search_weight(made.weight, 4, symmetric=False)
    made.weight_scale, made.weight_zero_point = nn.Parameter(scale), nn.Parameter(zero_point)
    made.input_scale, made.input_zero_point = nn.Parameter(torch.full((1,), 0.3)), nn.Parameter(torch.full((1,), 7.0))
    state = made.packed_state()
    shapes = packed_shapes(tuple(layer.weight.shape), made.bits, 1, 24, True, low_rank=4)  # type: ignore[arg-type]
    assert {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in state.items()} == shapes
    packed = PackedLayer(layer, made.bits, made.steps, shapes)
    packed.load_state_dict(state)
    x = torch.randn(shape)
    with torch.no_grad():
        assert torch.equal(packed(x), made(x))


def test_merged_branches_stand_side_by_side() -> None:
    torch.manual_seed(0)
    one, three = (LowRankBranch(torch.randn(2, 6).half(), torch.randn(n, 2).half()) for n in (4, 5))
    merged = merge_branches([one, None, three], [4, 3, 5])
    assert merged is not None
    x = torch.randn(7, 6)
    torch.testing.assert_close(merged(x), torch.cat([one(x), torch.zeros(7, 3), three(x)], -1))
    assert merge_branches([None, None], [4, 3]) is None


def test_branches_stand_beside_low_bit_products_that_are_wide_enough() -> None:
    wide = LayerInfo("wide", "conv2d", (32, 16, 3, 3), 100)
    layers = [
        wide,
        LayerInfo("first", "conv2d", (32, 16, 3, 3), 100, role="input"),  # 8 bits
        LayerInfo("narrow", "linear", (8, 64), 100),
        LayerInfo("grouped", "conv2d", (32, 8, 3, 3), 100, groups=2),
        LayerInfo("attention", "attention", (32, 32), 100, heads=2),
    ]
    plans = with_branches(assign_bits(layers, QuantizationSpec.parse("4/4")), 8)
    assert {plan.info.name: plan.low_rank for plan in plans if plan.low_rank} == {"wide": 8}
    assert all(plan.low_rank == 0 for plan in with_branches(plans, 0))


def test_a_rank_that_no_layer_can_have_is_refused() -> None:
    layers = [LayerInfo("wide", "conv2d", (32, 16, 3, 3), 100)]
    for bits, rank, fix in (("4/4", 32, "at most 31"), ("8/8", 4, "fewer than 8 bits")):
        plans = with_branches(assign_bits(layers, QuantizationSpec.parse(bits)), rank)
        with pytest.raises(UsageError, match=fix):
            require_branches(plans, rank)
    require_branches(plans, 0)


def test_bit_operations_count_the_branch() -> None:
    positions, rows, columns = 10, 32, 16 * 9
    layer = LayerRecord("a", "conv2d", (32, 16, 3, 3), positions * rows * columns, bits=(4, 4))
    branch = positions * 8 * (rows + columns) * 16 * 32
    assert bops([replace(layer, low_rank=8)]) == bops([layer]) + branch
    assert bops([replace(layer, low_rank=8, bits=(32, 32))]) == bops([replace(layer, bits=(32, 32))])

"""The trainable and the packed layer compute the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dqtool.core.bits import LayerBits
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.packed_layer import PackedLayer, packed_shapes
from dqtool.nn.steps import StepIndex

CASES = [nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(4, 8, 3, groups=2, stride=2), nn.Linear(7, 9), nn.Linear(33, 5)]


def make(like: nn.Module, bits: LayerBits) -> FakeQuantLayer:
    torch.manual_seed(0)
    layer = FakeQuantLayer(like, bits, StepIndex(torch.arange(3.0)))
    channels = like.in_channels if isinstance(like, nn.Conv2d) else like.in_features
    layer.dilation = torch.rand(channels) + 1
    if bits.quantizes_weight:
        rows = layer.weight.shape[0]
        symmetric = layer.low == 1
        layer.weight_scale = nn.Parameter(torch.rand(rows) * 0.02 + (0.001 if symmetric else 0.02))
        layer.weight_zero_point = nn.Parameter(
            torch.full((rows,), 128.0 if symmetric else 2 ** (bits.weight - 1) - 1.3)
        )
    if bits.quantizes_input:
        layer.input_scale = nn.Parameter(torch.rand(3) * 0.1 + 0.05)
        layer.input_zero_point = nn.Parameter(torch.tensor([0.0, 1.4, 3.0]))
    return layer


@pytest.mark.parametrize("bits", [(4, 4), (2, 3), (6, 6), (7, 5), (8, 8), (4, 16), (16, 8)])
@pytest.mark.parametrize("like", CASES, ids=lambda m: type(m).__name__ + str(tuple(m.weight.shape)))
def test_packed_layer_is_bit_identical_to_the_trained_one(like: nn.Module, bits: tuple[int, int]) -> None:
    layer = make(like, LayerBits(*bits))
    state = layer.packed_state()
    channels = like.in_channels if isinstance(like, nn.Conv2d) else like.in_features
    shapes = packed_shapes(tuple(like.weight.shape), layer.bits, 3, channels, True)
    assert {k: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for k, v in state.items()} == shapes
    packed = PackedLayer(like, layer.bits, layer.steps, shapes)
    packed.load_state_dict(state)
    assert torch.equal(packed.quantized_weight(), layer.quantized_weight().detach())
    x = torch.randn(3, channels, 6, 6) if isinstance(like, nn.Conv2d) else torch.randn(3, 4, channels)
    layer.steps.select(torch.tensor([0, 1, 2]))
    assert torch.equal(packed(x), layer(x).detach())


def test_centred_codes_fit_int8_at_every_width() -> None:
    for bits in range(2, 9):
        layer = make(nn.Linear(16, 4), LayerBits(bits, bits))
        packed = PackedLayer(nn.Linear(16, 4), layer.bits, layer.steps, packed_shapes((4, 16), layer.bits, 3, 16, True))
        packed.load_state_dict(layer.packed_state())
        assert int(packed.codes().abs().max()) <= (127 if bits == 8 else 2**bits - 1)


def test_half_precision_input_comes_back_in_half_precision() -> None:
    layer = make(nn.Linear(7, 9), LayerBits(4, 4))
    assert layer(torch.randn(2, 7).half()).dtype == torch.float16

"""Convolutions that pad with something else than zeros on all sides stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dqtool.core.bits import LayerBits
from dqtool.graph.leaves import zero_padding
from dqtool.graph.network import NetworkGraph
from dqtool.graph.trace import kept_float
from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.steps import StepIndex


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"padding": (1, 2)}, (1, 2)),
        ({"padding": "valid"}, (0, 0)),
        ({"padding": "same"}, (1, 1)),
        ({"padding": "same", "dilation": (1, 2)}, (1, 2)),
        ({"padding": 1, "padding_mode": "reflect"}, None),
    ],
)
def test_zeros_on_either_side(options: dict[str, Any], expected: tuple[int, int] | None) -> None:
    assert zero_padding(nn.Conv2d(2, 2, 3, **options)) == expected


def test_an_even_kernel_pads_one_side_more() -> None:
    assert zero_padding(nn.Conv2d(2, 2, 2, padding="same")) is None


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mirrored = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(3, 3, 3, padding="same")

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.same(self.mirrored(sample)),)


def test_what_pads_otherwise_is_not_quantized_and_said() -> None:
    network = Network()
    layers = NetworkGraph(network, {"sample": torch.randn(1, 3, 8, 8)}).trace.layers
    assert [info.name for info in layers] == ["same"]
    assert "reflect" in kept_float(network, layers)["mirrored"]


def test_padding_by_name_is_kept() -> None:
    torch.manual_seed(0)
    layer, x = Network().same, torch.randn(2, 3, 8, 8)
    fake = FakeQuantLayer(layer, LayerBits(16, 16), StepIndex(torch.zeros(1)))
    torch.testing.assert_close(fake(x), layer(x))

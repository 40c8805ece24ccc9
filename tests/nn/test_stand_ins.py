"""Networks that look at the dtype of a layer's parameters or weight keep running when the layer is quantized."""

from __future__ import annotations

import torch
from torch import nn

from dqtool.core.bits import LayerBits
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.surgery import insert_packed


def test_a_part_without_parameters_shows_an_empty_one_and_a_layer_a_weight() -> None:
    network = nn.Module()
    network.embedder = nn.Sequential(nn.Linear(4, 8), nn.SiLU())
    network.norm = nn.LayerNorm(8)
    before = {name: p.numel() for name, p in network.norm.named_parameters()}
    plan = LayerPlan(LayerInfo("embedder.0", "linear", (8, 4), 32, bias=True), LayerBits(4, 8))
    insert_packed(network, [plan], timesteps=2)
    shown = next(iter(network.embedder.parameters()))
    assert (shown.numel(), shown.dtype) == (0, torch.float32)
    assert {name: p.numel() for name, p in network.norm.named_parameters()} == before
    assert [name for name, _ in network.named_parameters()] == ["norm.weight", "norm.bias"]
    assert network.embedder[0].weight.dtype == torch.float32
    assert network.embedder[0].weight.device == network.norm.weight.device
    assert "embedder.0.weight" not in network.state_dict()

"""Roles, order and dependencies are observed, not declared."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from helpers import NETWORK
from torch import nn

from dqtool.graph.network import NetworkGraph
from dqtool.models.families import FAMILIES


@pytest.fixture(scope="module")
def traced():
    family = FAMILIES["UNet2DModel"]
    model = UNet2DModel(**NETWORK)
    return model, family.graph(model, model.config).trace


def test_every_layer_is_found_once(traced) -> None:
    model, result = traced
    names = [info.name for info in result.layers if info.kind != "attention"]
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sorted(names) == sorted(expected)


def test_ends_are_found_by_role(traced) -> None:
    _, result = traced
    roles = {info.name: info.role for info in result.layers if info.role}
    assert roles == {"conv_in": "input", "conv_out": "output"}


def test_macs_of_conv_linear_and_attention(traced) -> None:
    model, result = traced
    by_name = {info.name: info for info in result.layers}
    size = model.config.sample_size
    assert by_name["conv_in"].macs == size * size * model.conv_in.weight.numel()
    attention = next(info for info in result.layers if info.kind == "attention")
    queries, keys, inner = attention.shape
    assert attention.macs == 2 * queries * keys * inner


def test_q_k_v_share_one_input(traced) -> None:
    _, result = traced
    for info in result.layers:
        if info.name.endswith((".to_k", ".to_v")):
            assert info.shares == info.name.rsplit(".", 1)[0] + ".to_q"


def test_blocks_read_skip_connections(traced) -> None:
    _, result = traced
    order = [block.name for block in result.blocks]
    assert order.index("conv_in") < order.index("mid_block.resnets.0") < order.index("conv_out")
    last_resnet = [b for b in result.blocks if b.name.startswith("up_blocks")][-1]
    assert "conv_in" in last_resnet.reads
    assert result.output_reads == {"conv_out"}
    for position, block in enumerate(result.blocks):
        assert all(order.index(name) < position for name in block.reads)


class _Renamed(nn.Module):
    """Ends that no list of names or indices would find: defined in another order than run."""

    def __init__(self) -> None:
        super().__init__()
        self.tail = nn.Linear(8, 4)
        self.clock = nn.Linear(1, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(4, 8)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        clock = self.clock(timestep.float()[:, None])
        return (self.tail(torch.relu(self.middle(self.head(sample) + clock))),)


def test_roles_follow_the_data() -> None:
    result = NetworkGraph(_Renamed(), {"sample": torch.randn(1, 4), "timestep": torch.ones(1)}).trace
    assert {info.name: info.role for info in result.layers} == {
        "clock": None,
        "head": "input",
        "middle": None,
        "tail": "output",
    }
    assert [block.name for block in result.blocks] == ["clock", "head", "middle", "tail"]

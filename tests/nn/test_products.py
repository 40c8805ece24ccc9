"""Attention of any kind: calls of the products are found in a recording, and computed as PyTorch does."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.core.bits import AttentionBits
from dqtool.graph.attention import PRODUCTS, attention_layout, is_attention, own_processor
from dqtool.graph.network import NetworkGraph
from dqtool.nn.attention import attach_operands
from dqtool.nn.steps import StepIndex

HEADS, WIDTH = 4, 8


class Own(nn.Module):
    """Attention in a form that no processor of diffusers has: one key head for two query heads, a gate, any mask."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, (HEADS + 2 * HEADS // 2) * WIDTH)
        self.gate = nn.Linear(16, HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, 16)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        """Attend, `[N, S, 16]`."""
        heads = self.qkv(x).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
        q, k, v = heads.split([HEADS, HEADS // 2, HEADS // 2], 1)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **self.options)
        return self.out(torch.sigmoid(self.gate(x)) * y.transpose(1, 2).flatten(2))


class Outer(nn.Module):
    """A network with one attention of its own kind, one module with two calls, and one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.plain = Own(), nn.Linear(16, 16)
        self.twice = Twice()

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        """Run all parts."""
        return (self.twice(self.plain(self.first(sample)) + timestep.view(-1, 1, 1)),)


class Twice(nn.Module):
    """Two calls in one run can't be told apart."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend to itself twice."""
        x = x.unflatten(-1, (2, 8)).transpose(1, 2)
        x = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(x, x, x).transpose(1, 2).flatten(2)


def masked() -> Tensor:
    """A mask `[5, 5]` in which the third query sees nothing."""
    mask = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    mask[2] = False
    return mask


def test_products_are_found_where_every_run_makes_one_call() -> None:
    graph = NetworkGraph(Outer(), {"sample": torch.randn(1, 5, 16), "timestep": torch.tensor([3.0])})
    found = {info.name: info for info in graph.trace.layers if info.kind == "attention"}
    assert set(found) == {"first"}
    assert found["first"].shape == (5, 5, HEADS * WIDTH)
    assert found["first"].heads == HEADS
    assert found["first"].macs == 2 * HEADS * 5 * 5 * WIDTH
    assert graph.recording.products.own["twice"] == 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": masked()},
        {"attn_mask": torch.randn(2, 1, 5, 5)},
    ],
    ids=["plain", "causal", "scale", "float-mask", "bool-mask", "mask-by-sample"],
)
def test_float_operands_give_what_pytorch_gives(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    module, x = Own(**options), torch.randn(2, 5, 16)
    expected = module(x)
    attach_operands(module, AttentionBits(16, 16), StepIndex(torch.zeros(1)))
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


def test_operands_are_quantized_inside_the_modules_own_forward() -> None:
    torch.manual_seed(0)
    module, x = Own(), torch.randn(2, 5, 16)
    expected = module(x).detach()
    attach_operands(module, AttentionBits(8, 8), StepIndex(torch.zeros(1)))
    assert is_attention(module)
    assert attention_layout(module) == PRODUCTS
    for name, scale in {"q": 0.05, "k": 0.05, "v": 0.05, "probs": 1 / 255}.items():
        module.register_buffer(f"{name}_scale", torch.full((1, HEADS), scale))
    changed = module(x).detach()
    assert not torch.equal(changed, expected)
    assert float((changed - expected).norm() / expected.norm()) < 0.05
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), changed)
        assert own_processor(twin) is not own_processor(module)


def test_a_graph_holds_the_products_without_a_break() -> None:
    torch.manual_seed(0)
    module, x = Own(), torch.randn(2, 5, 16)
    attach_operands(module, AttentionBits(16, 16), StepIndex(torch.zeros(1)))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), module(x))

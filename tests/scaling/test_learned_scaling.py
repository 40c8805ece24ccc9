"""Learned scale and shift change nothing in float, train with the block, and end in weights, dilations and biases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.core.bits import LayerBits
from dqtool.graph.recording import record
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.surgery import assign_tables, initialise_weights, insert_fake, packed_state
from dqtool.scaling.folding import find_shifts, fold_scale, subtract_shift
from dqtool.scaling.learning import attach, merge_learned
from dqtool.training.optimizer import QuantAdam
from dqtool.training.options import Rates

T = 3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.one, self.two, self.conv = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Conv2d(6, 4, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        h = self.norm(sample)
        h = F.silu(self.one(h) * self.two(h))  # [N, S, 6]
        return self.conv(h.transpose(1, 2).unflatten(2, (3, 3)))


LAYERS = [
    LayerInfo("one", "linear", (6, 8), 0, bias=True),
    LayerInfo("two", "linear", (6, 8), 0, bias=True, shares="one"),
    LayerInfo("conv", "conv2d", (4, 6, 3, 3), 0, bias=True),
]


def inputs(seed: int = 0, batch: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 9, 8, generator=generator),
        "timestep": torch.randint(0, T, (batch,), generator=generator).float(),
    }


def quantized(bits: LayerBits) -> tuple[nn.Module, dict]:
    torch.manual_seed(0)
    block = _Block()
    shifts = find_shifts(record(block, inputs()), LAYERS)
    dilation = {info.name: torch.linspace(0.5, 2, info.shape[1]) for info in LAYERS}
    for name, scale in dilation.items():
        weight = block.get_parameter(f"{name}.weight")
        weight.data *= scale.view(1, -1, *(1,) * (weight.dim() - 2))
    plans = [LayerPlan(info, bits, dilated=True) for info in LAYERS]
    insert_fake(block, plans, torch.arange(T).float(), dilation)
    table = (torch.full((T,), 0.3), torch.full((T,), 7.0))
    assign_tables(block, plans, {"one": table, "conv": table})
    if bits.quantizes_weight:
        initialise_weights(block)
    return block.requires_grad_(False), shifts


def moved(block: nn.Module) -> None:
    """Some values for what is learned."""
    for name, p in block.named_parameters():
        if "learned" in name:
            p.data = torch.linspace(-0.3, 0.4, p.numel())


def test_only_groups_whose_producer_has_a_bias_are_moved() -> None:
    _, shifts = quantized(LayerBits(16, 16))
    assert {owner: found.names for owner, found in shifts.items()} == {"one": ["norm"]}


def test_shifts_and_folds_go_to_the_tensors_device() -> None:
    _, shifts = quantized(LayerBits(16, 16))
    tensors = {"norm.bias": torch.zeros(8, device="meta"), "norm.weight": torch.ones(8, device="meta")}
    subtract_shift(tensors, shifts["one"], torch.ones(8, device="meta"))
    fold_scale(tensors, shifts["one"], torch.ones(8, device="meta"))
    assert {value.device.type for value in tensors.values()} == {"meta"}


def test_in_float_nothing_changes_whatever_is_learned() -> None:
    block, shifts = quantized(LayerBits(16, 16))
    before = block(**inputs())
    attach(block, [(["one", "two"], 1e-5), (["conv"], 1e-5)], shifts)
    assert block.one.learned is block.two.learned
    assert torch.equal(block(**inputs()), before) or torch.allclose(block(**inputs()), before, atol=1e-6)
    moved(block)
    torch.testing.assert_close(block(**inputs()), before, rtol=1e-4, atol=1e-5)
    merge_learned(block, shifts)
    torch.testing.assert_close(block(**inputs()), before, rtol=1e-4, atol=1e-5)


def test_baking_keeps_the_quantized_function_and_leaves_plain_layers() -> None:
    block, shifts = quantized(LayerBits(8, 8))
    names = set(packed_state(block))
    attach(block, [(["one", "two"], 1e-5), (["conv"], 1e-5)], shifts)
    moved(block)
    learned = block(**inputs())
    merge_learned(block, shifts)
    assert not any("learned" in name for name, _ in block.named_parameters())
    assert set(packed_state(block)) == names
    assert torch.equal(block.one.dilation, block.two.dilation)
    error = (block(**inputs()) - learned).square().mean() / learned.square().mean()
    assert error < 1e-4  # codes that lay on a rounding threshold


def test_scale_and_shift_train_at_their_own_rate() -> None:
    block, shifts = quantized(LayerBits(4, 4))
    target = torch.randn(4, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    attach(block, [(["one", "two"], 1e-5), (["conv"], 1e-5)], shifts)
    for layer in (block.one, block.two, block.conv):
        layer.requires_grad_(True)
    optimizer = QuantAdam(block, Rates())
    for _ in range(5):
        optimizer.zero_grad()
        F.mse_loss(block(**inputs()), target).backward()
        optimizer.step(torch.ones(T, dtype=torch.bool))
    optimizer.release()
    for learned in (block.one.learned, block.conv.learned):
        for p in learned.parameters():
            assert 0 < p.abs().max() <= 6e-5  # five steps of about 1e-5
    assert block.conv.learned.shift is None


def test_in_float_the_gradients_of_both_halves_cancel() -> None:
    block, shifts = quantized(LayerBits(16, 16))
    attach(block, [(["one", "two"], 1e-5), (["conv"], 1e-5)], shifts)
    block.one.learned.requires_grad_(True)
    block(**inputs()).square().sum().backward()
    for p in block.one.learned.parameters():
        assert p.grad.abs().max() < 1e-3


@pytest.mark.parametrize("bits", ["4/4", "8/8"])
def test_a_layer_without_it_is_as_before(bits: str) -> None:
    block, _ = quantized(LayerBits(*map(int, bits.split("/"))))
    assert block.one.learned is None
    assert torch.equal(block.one.output_bias(), block.one.bias)

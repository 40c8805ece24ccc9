"""Factors are pulled into whatever makes the input; what can't be passed is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.core.dilation import broadcast_scale
from dqtool.graph.attention import is_attention
from dqtool.graph.leaves import is_quantizable
from dqtool.graph.recording import record
from dqtool.graph.trace import LayerInfo
from dqtool.scaling.folding import Fold, find_folds, fold_scale, fold_scales


def layers_of(network: nn.Module) -> list[LayerInfo]:
    """All leaves, q, k, v of a self-attention (k, v of a cross-attention) sharing one input."""
    infos = []
    for name, module in network.named_modules():
        if is_quantizable(module):
            parent, _, leaf = name.rpartition(".")
            shares = None
            attention = network.get_submodule(parent)
            if is_attention(attention):
                owner = "to_k" if getattr(attention, "is_cross_attention", False) else "to_q"
                if leaf in ("to_k", "to_v") and leaf != owner:
                    shares = f"{parent}.{owner}"
            groups = getattr(module, "groups", 1)
            infos.append(LayerInfo(name, "linear", tuple(module.weight.shape), 0, groups=groups, shares=shares))
    return infos


def randomised(network: nn.Module) -> nn.Module:
    """No zero-initialised layer may hide a mistake."""
    torch.manual_seed(1)
    for p in network.parameters():
        p.data = torch.randn_like(p) * 0.3
    return network.eval().requires_grad_(False)


def output(network: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        y = network(**inputs)
    return y if isinstance(y, Tensor) else y[0]


def check(network: nn.Module, inputs: dict[str, Any], expected: dict[str, list[str]], crossing: set[str]) -> None:
    """The folds are `expected` (layer: targets) and each alone, and all together, leave the output as it was."""
    randomised(network)
    folds = find_folds(record(network, inputs), layers_of(network))
    assert {found.layers[0]: found.names for found in folds} == expected
    assert {found.layers[0] for found in folds if found.crosses} == crossing
    original = {name: value.clone() for name, value in network.state_dict().items()}
    before = output(network, inputs)
    whole = dict(original)
    for found in folds:
        alone = dict(original)
        scale = dilate_group(network, alone, found)
        fold_scale(alone, found, scale)
        network.load_state_dict(alone)
        error = (output(network, inputs) - before).abs().max() / before.abs().max()
        assert error < 1e-5, found.layers
        dilate_group(network, whole, found, scale)
        fold_scale(whole, found, scale)
    network.load_state_dict(whole)
    assert (output(network, inputs) - before).abs().max() / before.abs().max() < 1e-5
    network.load_state_dict(original)


def dilate_group(network: nn.Module, state: dict[str, Tensor], found: Fold, scale: Tensor | None = None) -> Tensor:
    for name in found.layers:
        groups, weight = getattr(network.get_submodule(name), "groups", 1), state[f"{name}.weight"]
        scale = torch.rand(weight.shape[1] * groups) * 7 + 0.5 if scale is None else scale
        state[f"{name}.weight"] = weight * broadcast_scale(scale, weight, groups)
    assert scale is not None
    return scale


def test_unet_attention_takes_its_norm_and_its_values() -> None:
    from diffusers import UNet2DModel
    from helpers import NETWORK

    network = UNet2DModel(**NETWORK)
    expected, crossing = {}, set()
    for name, module in network.named_modules():
        if is_attention(module):
            expected |= {f"{name}.to_q": [f"{name}.group_norm"], f"{name}.to_out.0": [f"{name}.to_v"]}
            crossing.add(f"{name}.to_out.0")
    assert len(expected) == 8
    check(network, {"sample": torch.randn(1, 1, 8, 8), "timestep": torch.tensor([7])}, expected, crossing)


def test_transformer_block_takes_norms_values_and_the_linear_half_of_geglu() -> None:
    from diffusers.models.attention import BasicTransformerBlock

    network = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12)
    check(
        network,
        {"hidden_states": torch.randn(1, 5, 16), "encoder_hidden_states": torch.randn(1, 4, 12)},
        {
            "attn1.to_q": ["norm1"],
            "attn1.to_out.0": ["attn1.to_v"],
            "attn2.to_q": ["norm2"],
            "attn2.to_out.0": ["attn2.to_v"],
            "ff.net.0.proj": ["norm3"],
            "ff.net.2": ["ff.net.0.proj"],
        },
        {"attn1.to_out.0", "attn2.to_out.0"},
    )
    geglu = next(
        found
        for found in find_folds(
            record(network, {"hidden_states": torch.randn(1, 5, 16), "encoder_hidden_states": torch.randn(1, 4, 12)}),
            layers_of(network),
        )
        if found.layers == ("ff.net.2",)
    ).targets[0]
    assert geglu.channels.tolist() == [*range(64), *[-1] * 64]


def test_dit_takes_shift_and_scale_rows_of_adaln() -> None:
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, norm_num_groups=4
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([7]),
        "class_labels": torch.tensor([1]),
    }
    expected, crossing = {"proj_out_2": ["proj_out_1"]}, set()
    for i in range(2):
        block = f"transformer_blocks.{i}"
        expected[f"{block}.attn1.to_q"] = expected[f"{block}.ff.net.0.proj"] = [f"{block}.norm1.linear"]
        expected[f"{block}.attn1.to_out.0"] = [f"{block}.attn1.to_v"]
        crossing.add(f"{block}.attn1.to_out.0")
    check(network, inputs, expected, crossing)
    rows = find_folds(record(network, inputs), layers_of(network))[0].targets[0]
    shift, scale = rows.channels[:16], rows.channels[16:32]  # shift_msa, scale_msa, then four that stay
    assert shift.tolist() == scale.tolist() == list(range(16))
    assert rows.offset.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 64
    assert bool((rows.channels[32:] == -1).all())


def test_joint_attention_keeps_values_that_two_projections_read() -> None:
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        in_channels=4,
        out_channels=4,
        pos_embed_max_size=8,
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "pooled_projections": torch.randn(1, 12),
    }
    folds = find_folds(record(network, inputs), layers_of(network))
    found = {name for each in folds for name in each.layers}
    assert "transformer_blocks.0.attn.to_q" in found
    assert not any("to_out" in name or "to_add_out" in name for name in found)
    check(network, inputs, {each.layers[0]: each.names for each in folds}, set())


class _Small(nn.Module):
    def __init__(self, glue: Any, second: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.last, self.glue = nn.Linear(8, 5), glue

    def forward(self, sample: Tensor) -> Tensor:
        return self.glue(self, sample)


ALLOWED = {
    "straight": (lambda m, x: m.last(m.first(x)), ["first"]),
    "relu": (lambda m, x: m.last(F.relu(m.first(x))), ["first"]),
    "scaled and moved": (lambda m, x: m.last((m.first(x) - 2) / 3 + 1), ["first"]),
    "reshaped": (lambda m, x: m.last(m.first(x).unflatten(1, (2, 4)).flatten(1)), ["first"]),
    "norm": (lambda m, x: m.last(m.norm(m.first(x))), ["norm"]),
    "sum": (lambda m, x: m.last(m.norm(m.first(x)) + m.second(m.first(x))), ["norm", "second"]),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_division_passes(name: str) -> None:
    glue, targets = ALLOWED[name]
    network = randomised(_Small(glue))
    inputs = {"sample": torch.randn(3, 6)}
    found = next(f for f in find_folds(record(network, inputs), layers_of(network)) if f.layers == ("last",))
    assert found.names == targets
    state, before = dict(network.state_dict()), output(network, inputs)
    fold_scale(state, found, dilate_group(network, state, found))
    network.load_state_dict(state)
    torch.testing.assert_close(output(network, inputs), before, rtol=1e-5, atol=1e-5)


def in_place(m: Any, x: Tensor) -> Tensor:
    h = m.first(x)
    h[:, 0] += 1
    return m.last(h)


REFUSED = {
    "silu": lambda m, x: m.last(F.silu(m.first(x))),
    "gelu": lambda m, x: m.last(F.gelu(m.norm(x @ m.first.weight.T))),
    "softmax": lambda m, x: m.last(m.first(x).softmax(-1)),
    "another reader": lambda m, x: m.last(h := m.first(x)) + h[:, :5],
    "another layer": lambda m, x: m.last(h := m.first(x)) + m.second(h)[:, :5],
    "a product of it with itself": lambda m, x: m.last((h := m.first(x)) * h),
    "an overlapping part": lambda m, x: m.last(F.pad((h := m.first(x))[:, :4], (0, 4))) + h[:, 3:8],
    "a layer that runs twice": lambda m, x: m.last(m.second(m.second(m.first(x)))),
    "a reader that runs twice": lambda m, x: m.last(m.first(x)) + m.last(m.first(x + 1)),
    "the network's input": lambda m, x: m.last(F.pad(x, (0, 2))),
    "changed in place": in_place,
    "channels mixed": lambda m, x: m.last(m.first(x).view(-1, 2, 4).transpose(1, 2).sum(0).reshape(1, 8)),
    "the network's output": lambda m, x: (m.first(x), m.last(m.first(x)))[1] + 0 * (m.first(x))[:, :5],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stops_a_division(name: str) -> None:
    network = randomised(_Small(REFUSED[name]))
    folds = find_folds(record(network, {"sample": torch.randn(3, 6)}), layers_of(network))
    assert not [found for found in folds if "last" in found.layers], folds


def test_a_producer_without_bias_takes_no_offset() -> None:
    network = _Small(lambda m, x: m.last(m.first(x) + 1))
    inputs = {"sample": torch.randn(3, 6)}
    assert find_folds(record(network, inputs), layers_of(network))
    network.first = nn.Linear(6, 8, bias=False)
    assert not find_folds(record(network, inputs), layers_of(network))


def test_a_producer_that_shares_its_weight_stays_as_it_is() -> None:
    network = _Small(lambda m, x: m.last(m.second(m.norm(m.first(x)))))
    inputs = {"sample": torch.randn(3, 6)}
    assert ("last",) in [found.layers for found in find_folds(record(network, inputs), layers_of(network))]
    network.third = nn.Linear(8, 8)
    network.third.weight = network.second.weight
    assert ("last",) not in [found.layers for found in find_folds(record(network, inputs), layers_of(network))]


def test_packed_producers_shrink_their_scales_and_keep_their_codes() -> None:
    network = _Small(lambda m, x: m.last(m.first(x)))
    (found,) = find_folds(record(network, {"sample": torch.randn(3, 6)}), layers_of(network))
    scale = torch.linspace(1, 8, 8)
    codes = torch.ones(8, 1, dtype=torch.int32)
    state = {
        "first.weight_packed": codes,
        "first.weight_scale": torch.full((8,), 0.5),
        "first.bias": torch.full((8,), 3.0),
        "last.dilation": scale,
    }
    assert fold_scales(state, [found], crossing=False) == {"last": ["first"]}
    assert set(state) == {"first.weight_packed", "first.weight_scale", "first.bias"}
    assert state["first.weight_packed"] is codes
    assert torch.equal(state["first.weight_scale"], torch.full((8,), 0.5) / scale)
    assert torch.equal(state["first.bias"], torch.full((8,), 3.0) / scale)


def test_recording_copies_no_weights_and_leaves_the_network_alone() -> None:
    network = _Small(lambda m, x: m.last(m.first(x)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    flow = record(network, {"sample": torch.randn(3, 6)})
    assert [op.layer for op in flow.ops if op.layer] == ["first", "last"]
    assert all(p.is_meta for p in flow.network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())

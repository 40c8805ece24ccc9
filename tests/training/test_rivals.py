"""Defining properties of each method that DilateQuant is compared with."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from helpers import quantized_conv
from torch import nn

from dqtool.nn.layers import FakeQuantLayer
from dqtool.nn.surgery import packed_state, quant_layers
from dqtool.training.data import DistillationTask
from dqtool.training.low_rank import LowRank, attach_low_rank
from dqtool.training.methods import METHODS
from dqtool.training.network_loop import one_step_at_a_time, rows_by_step
from dqtool.training.rounding import merge_adapters
from dqtool.training.scale_gradients import gradient_scale, scaled_gradients
from dqtool.training.temporal import TemporalPath


def train(name: str, task: DistillationTask, bars: Any, **given: Any) -> dict[str, Any]:
    from dataclasses import replace

    method = METHODS[name]
    return method.train(task, replace(method.options(), batch_size=8, **given), bars)


def test_lsq_scale_gradients_equal_the_closed_form() -> None:
    layer = quantized_conv()
    layer.steps.select(torch.tensor([2]))
    x = torch.randn(3, 3, 5, 5) * 2
    scale, zero = float(layer.input_scale[2].detach()), float(layer.input_zero_point[2].detach())
    layer.quantize_input(x).sum().backward()
    ratio = x / scale
    code = (ratio.round() + zero).clamp(0, 15) - zero
    inside = (ratio.round() + zero).clamp(0, 15) == ratio.round() + zero
    expected = torch.where(inside, code - ratio, code).sum()  # Eq. 3 of arXiv 1902.08153
    got = layer.input_scale.grad
    torch.testing.assert_close(got[2], expected, rtol=1e-4, atol=1e-3)
    assert bool((got[[0, 1, 3, 4, 5]] == 0).all())


def test_lsq_divides_them_by_the_root_of_count_and_levels(task: DistillationTask) -> None:
    assert gradient_scale(100, 4) == 1 / math.sqrt(100 * 15)
    student = task.student
    student.requires_grad_(True)

    def gradients() -> dict[str, torch.Tensor]:
        student.zero_grad()
        task.predict(student, slice(0, 4)).square().mean().backward()
        return {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None and "scale" in n}

    plain = gradients()
    with scaled_gradients(task):
        scaled = gradients()
    conv = student.get_submodule("mid_block.resnets.0.conv1")
    factor = gradient_scale(conv.weight[0].numel(), 4)
    torch.testing.assert_close(
        scaled["mid_block.resnets.0.conv1.weight_scale"], plain["mid_block.resnets.0.conv1.weight_scale"] * factor
    )
    factor = gradient_scale(16 * 4 * 4, 4)  # 16 channels of 4 x 4
    torch.testing.assert_close(
        scaled["mid_block.resnets.0.conv1.input_scale"], plain["mid_block.resnets.0.conv1.input_scale"] * factor
    )
    tables = {n for n in plain if n.endswith(("q_scale", "probs_scale"))}
    assert tables
    assert all(not torch.equal(plain[n], scaled[n]) for n in tables if plain[n].abs().sum() > 0)
    assert torch.equal(gradients()["conv_in.weight_scale"], plain["conv_in.weight_scale"])  # no hook is left


def test_a_low_rank_update_of_zero_is_the_plain_layer() -> None:
    layer = quantized_conv()
    x, plain = torch.randn(2, 3, 5, 5), layer.quantized_weight().detach()
    before = layer(x)
    ((_, update),) = attach_low_rank(nn.ModuleList([layer]), 32, 0)
    assert update.down.shape == (4, 27)  # the rank is the smaller side's
    assert torch.equal(layer.quantized_weight(), plain)
    assert torch.equal(layer(x), before)


def test_a_merged_update_gives_the_bits_it_gave_beside_the_weight() -> None:
    layer = quantized_conv()
    ((_, update),) = attach_low_rank(nn.ModuleList([layer]), 2, 0)
    assert isinstance(update, LowRank)
    with torch.no_grad():
        update.up.normal_(0, 0.05)
    trained = layer.quantized_weight().detach()
    merge_adapters(nn.ModuleList([layer]))
    assert layer.adapter is None
    assert torch.equal(layer.quantized_weight(), trained)


def test_lora_qat_leaves_biases_and_takes_one_step_at_a_time(task: DistillationTask, silent: Any) -> None:
    biases = {n: p.clone() for n, p in task.student.named_parameters() if n.endswith("bias")}
    weights = {n: layer.weight.detach().clone() for n, layer in quant_layers(task.student).items()}
    train("lora-qat", task, silent.bars, iters=6)
    for name, value in task.student.named_parameters():
        if name in biases:
            assert torch.equal(value, biases[name]), name
    assert any(not torch.equal(layer.weight, weights[n]) for n, layer in quant_layers(task.student).items())
    choose = one_step_at_a_time(task, 5)
    generator = torch.Generator().manual_seed(0)
    steps = [set(task.trajectory.rows[choose(i, generator)].tolist()) for i in range(5)]
    assert steps == [{0}, {1}, {2}, {3}, {0}]


def test_qat_partial_leaves_the_weights_of_other_layers_alone(task: DistillationTask, silent: Any) -> None:
    before = copy.deepcopy(task.student)
    metrics = train("qat-partial", task, silent.bars, iters=6, temporal_iters=3)
    trained = set(metrics["trained_layers"])
    assert {"time_embedding.linear_1", "mid_block.resnets.0.time_emb_proj", "mid_block.attentions.0.to_q"} <= trained
    assert "mid_block.attentions.0.to_out.0" not in trained
    moved = set()
    for name, layer in quant_layers(task.student).items():
        old = before.get_submodule(name)
        same = torch.equal(layer.weight, old.weight) and (layer.bias is None or torch.equal(layer.bias, old.bias))
        if not same:
            moved.add(name)
        assert torch.equal(layer.weight_scale, old.weight_scale)
    assert moved == trained
    conv, old = (net.get_submodule("mid_block.resnets.0.conv1") for net in (task.student, before))
    assert not torch.equal(conv.input_scale, old.input_scale)


def test_a_per_step_set_of_one_step_is_the_static_one(
    made: Path, tmp_path: Path, run: Run, make_task: Any, silent: Any
) -> None:
    path = tmp_path / "one.safetensors"
    assert (
        run("calibrate", "dilated.safetensors", "--steps", "1", "--samples", "8", "-o", path, cwd=made).returncode == 0
    )
    states = []
    for static in (False, True):
        task = make_task(path, static=static)
        assert len(rows_by_step(task)) == 1
        train("per-step", task, silent.bars, iters=6)
        states.append(packed_state(task.student))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_per_step_scales_come_from_their_own_step_alone(task: DistillationTask, silent: Any) -> None:
    other = copy.deepcopy(task)
    keep = task.trajectory.rows != 3  # other samples of the last step
    other.trajectory.x = torch.where(keep.view(-1, 1, 1, 1), task.trajectory.x, task.trajectory.x * 1.5)
    for each in (task, other):
        each.only = ["conv_in"]
        each.student.get_submodule("conv_in").weight_scale = None  # float weights: only activation scales learn
        train("per-step", each, silent.bars, iters=8, rounding=0.0)
    a, b = (each.student.get_submodule("conv_in").input_scale.detach() for each in (task, other))
    assert torch.equal(a[:3], b[:3])
    assert not torch.equal(a[3], b[3])


@pytest.mark.parametrize(
    "given", [{"bits": "4/16"}, {"preset": "nonstandard"}, {"keep": ("conv_in=16/8",)}, {"keep": ("conv_in=16/16",)}]
)
def test_per_step_passes_where_there_is_nothing_to_learn(make_task: Any, silent: Any, given: dict[str, Any]) -> None:
    """Float activations everywhere, and blocks with float weights, float inputs or both next to blocks that learn."""
    losses = train("per-step", make_task(**given), silent.bars, iters=8)["block_loss"]
    assert bool(losses["conv_in"]) == (given.get("keep") != ("conv_in=16/16",))
    assert losses["mid_block.resnets.0"]


def test_the_timesteps_path_alone_gives_what_the_network_gives(task: DistillationTask) -> None:
    roles = task.roles()
    direct: dict[str, torch.Tensor] = {}
    for network in (task.teacher, task.student):
        handles = [
            network.get_submodule(name).register_forward_hook(lambda _m, _a, y, n=name: direct.__setitem__(n, y))
            for name in roles.temporal_ends
        ]
        rows = torch.tensor([0, 5, 9, 14])
        with torch.no_grad():
            task.predict(network, rows)
            for handle in handles:
                handle.remove()
            got = TemporalPath(task, network, roles).outputs(rows)
            again = task.predict(network, rows)
        assert set(got) == set(direct)
        for name in got:
            torch.testing.assert_close(got[name], direct[name])
        assert torch.isfinite(again).all()
        assert not any("forward" in module.__dict__ for module in network.modules())


def test_every_layer_is_of_a_kind_that_can_be_trained(task: DistillationTask) -> None:
    assert all(isinstance(layer, FakeQuantLayer) for layer in quant_layers(task.student).values())

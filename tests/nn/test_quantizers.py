"""Step tables: each step's entries learn from that step alone, and samplers index the right ones."""

from __future__ import annotations

import torch
from helpers import T, quantized_conv

from dqtool.nn.quantizers import gather_rows, quantize_operand


def test_mixed_batch_gives_each_step_the_gradient_of_that_step_alone() -> None:
    layer, x, rows = quantized_conv(), torch.randn(8, 3, 5, 5), torch.tensor([0, 2, 2, 5, 0, 3, 3, 3])
    weight = torch.randn(8, 4, 5, 5)
    layer.steps.select(rows)
    (layer(x) * weight).sum().backward()
    mixed = {name: getattr(layer, name).grad.clone() for name in ("input_scale", "input_zero_point")}
    for step in range(T):
        layer.zero_grad()
        mine = rows == step
        if mine.any():
            layer.steps.select(rows[mine])
            (layer(x[mine]) * weight[mine]).sum().backward()
        for name, grad in mixed.items():
            alone = getattr(layer, name).grad
            expected = torch.zeros(()) if alone is None else alone[step]
            torch.testing.assert_close(grad[step], expected, rtol=1e-6, atol=1e-6)
            if not mine.any():
                assert grad[step] == 0


def test_table_of_one_step_equals_a_static_quantizer() -> None:
    x = torch.randn(4, 3, 5, 5)
    scale, zero_point = torch.tensor([0.2]), torch.tensor([5.0])
    rows = torch.tensor([3, 0, 1, 2])  # rows of other layers' tables: a table of one row ignores them
    static = quantize_operand(x, scale, zero_point, rows, 4)
    repeated = quantize_operand(x, scale.repeat(4), zero_point.repeat(4), rows, 4)
    assert torch.equal(static, repeated)


def test_rows_repeat_over_guidance_copies() -> None:
    table = torch.arange(5.0)
    assert gather_rows(table, torch.tensor([4, 1]), 6).tolist() == [4, 4, 4, 1, 1, 1]
    assert gather_rows(table, torch.tensor([2]), 6).tolist() == [2]

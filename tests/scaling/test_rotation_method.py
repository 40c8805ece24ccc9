"""The scaling `rotation`: its choice, and what calibration makes of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.core.bits import LayerBits
from dqtool.scaling.methods import Samples, ScalingInput, scaling_method


def inputs(x: Tensor, weight: Tensor) -> ScalingInput:
    return ScalingInput([weight], samples=Samples([x], [F.linear], LayerBits(4, 4)))


def test_rotation_is_chosen_where_outliers_cost_more_than_it_does() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96), torch.randn(24, 96)
    x[:, ::32] *= 30
    found = scaling_method("rotation")(inputs(x, weight))
    assert found.rotation in (16, 32)
    assert bool((found.scale == 1).all())


def test_channels_without_a_fitting_group_are_left_alone() -> None:
    torch.manual_seed(0)
    assert scaling_method("rotation")(inputs(torch.randn(8, 12), torch.randn(4, 12))).rotation == 0


def test_sparse_inputs_are_left_alone() -> None:
    weight, x = torch.eye(32) * 8, torch.randint(0, 16, (64, 32)).float()  # exact on the grid of 4 bits
    assert scaling_method("rotation")(inputs(x, weight)).rotation == 0

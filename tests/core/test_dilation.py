"""Weight Dilation: unchanged ranges and outputs, worked examples, shared inputs and errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.core.dilation import dilate_weight, weight_dilation, weight_ranges
from dqtool.errors import NumericError, UsageError


def make(kind: str, seed: int) -> tuple[Tensor, int]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind == "linear":
        return normal(12, 40), 1
    if kind == "conv":
        return normal(8, 24, 3, 3), 1
    if kind == "conv1d":
        return normal(6, 30, 5), 1
    if kind == "conv3d":
        return normal(4, 20, 1, 2, 3), 1
    if kind == "grouped":
        return normal(8, 16, 3, 3), 4
    if kind == "depthwise":
        return normal(16, 1, 3, 3), 16
    if kind == "zero_rows":
        weight = normal(10, 30)
        weight[[0, 3, 9]] = 0
        return weight, 1
    if kind == "dead_channels":
        weight = normal(6, 30, 3, 3)
        weight[:, [2, 5]] = 0
        return weight, 1
    if kind == "one_signed":
        weight = normal(6, 40).abs()
        weight[3:] *= -1
        return weight, 1
    if kind == "constant":
        return torch.full((5, 20), -0.3), 1
    if kind == "all_zero":
        return torch.zeros(5, 20), 1
    if kind == "denormal":
        weight = normal(4, 30)
        weight[:, :10] *= 1e-41
        weight[:, 10] = 1e-44
        return weight, 1
    if kind == "all_denormal":
        return normal(4, 30) * 1e-40, 1
    if kind == "half":
        return normal(12, 40).half(), 1
    raise AssertionError(kind)


KINDS = [
    "linear",
    "conv",
    "conv1d",
    "conv3d",
    "grouped",
    "depthwise",
    "zero_rows",
    "dead_channels",
    "one_signed",
    "constant",
    "all_zero",
    "denormal",
    "all_denormal",
    "half",
]


def rows_of(weight: Tensor, groups: int, k: int) -> tuple[slice, int]:
    """Return the rows of the out-channels that read in-channel k, and the column of k in them."""
    per_group, rows = weight.shape[1], weight.shape[0] // groups
    group = k // per_group
    return slice(group * rows, (group + 1) * rows), k % per_group


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_ranges_are_kept_and_bounds_are_reached(kind: str, seed: int) -> None:
    weight, groups = make(kind, seed)
    s = weight_dilation(weight, groups)
    dilated = dilate_weight(weight, s, groups)
    weight = weight.float()
    lo, hi = weight_ranges(weight)
    new_lo, new_hi = weight_ranges(dilated)
    assert dilated.shape == weight.shape
    assert s.dtype == dilated.dtype == torch.float32
    assert torch.equal(lo, new_lo)
    assert torch.equal(hi, new_hi)
    assert (s >= 1).all()
    assert (s <= 64).all()
    for k in range(s.numel()):
        rows, column = rows_of(weight, groups, k)
        count = rows.stop - rows.start
        before, after = weight[rows, column].reshape(count, -1), dilated[rows, column].reshape(count, -1)
        low, high = lo[rows, None], hi[rows, None]
        holds_bound = ((before == high) | (before == low)) & (before != 0)
        if holds_bound.any() or not before.any():
            assert s[k] == 1
            assert torch.equal(before, after)
        elif s[k] < 64:
            assert s[k] > 1
            infinity = torch.tensor(math.inf)
            reaches = (after >= torch.nextafter(high, -infinity)) & (before > 0)
            reaches |= (after <= torch.nextafter(low, infinity)) & (before < 0)
            assert reaches.any()


@pytest.mark.parametrize("kind", ["constant", "depthwise", "all_zero"])
def test_weights_without_slack_keep_ones(kind: str) -> None:
    weight, groups = make(kind, 0)
    assert torch.equal(weight_dilation(weight, groups), torch.ones(weight.shape[1] * groups))


def test_a_worked_example() -> None:
    weight = torch.tensor([[2.0, -0.5, 0.5, 0.0], [-4.0, 1.0, 0.5, 0.0]])
    # Channel 1: row 0 has lo -0.5 (held there), so 1. Channel 2: 2 / 0.5 = 4 in row 0, 1 / 0.5 = 2 in row 1.
    assert weight_dilation(weight).tolist() == [1, 1, 2, 1]
    assert dilate_weight(weight, torch.tensor([1.0, 1, 2, 1])).tolist() == [[2, -0.5, 1, 0], [-4, 1, 1, 0]]


def test_an_overflowing_ratio_takes_the_cap() -> None:
    weight = torch.tensor([[3e38, 1e-45], [0.0, 1e-45], [0.0, 0.0]])
    # Row 1's only non-zero weight is its own bound.
    assert weight_dilation(weight).tolist() == [1, 1]
    assert weight_dilation(weight[[0, 2]]).tolist() == [1, 64]
    assert weight_dilation(weight[[0, 2]], cap=8).tolist() == [1, 8]


def test_the_output_is_unchanged() -> None:
    torch.manual_seed(0)
    weight, groups = make("grouped", 1)
    x = torch.randn(2, 64, 9, 9)
    s = weight_dilation(weight, groups)
    out = F.conv2d(x / s.view(1, -1, 1, 1), dilate_weight(weight, s, groups), groups=groups, padding=1)
    torch.testing.assert_close(out, F.conv2d(x, weight, groups=groups, padding=1), rtol=1e-5, atol=1e-5)
    linear, _ = make("linear", 1)
    x = torch.randn(5, 40)
    s = weight_dilation(linear)
    torch.testing.assert_close(F.linear(x / s, dilate_weight(linear, s)), F.linear(x, linear), rtol=1e-5, atol=1e-5)


def test_weights_that_share_an_input_share_the_minimum() -> None:
    q, k, v = (make("linear", seed)[0] for seed in range(3))
    shared = weight_dilation([q, k, v])
    assert torch.equal(shared, torch.stack([weight_dilation(w) for w in (q, k, v)]).amin(0))
    assert torch.equal(shared, weight_dilation(torch.cat([q, k, v])))
    # A channel that is dead in one of them is still limited by the others.
    q[:, 7] = 0
    assert weight_dilation([q, k])[7] == weight_dilation(k)[7]


def test_groups_are_independent() -> None:
    weight, groups = make("grouped", 2)
    s = weight_dilation(weight, groups)
    for group in range(groups):
        assert torch.equal(s[group * 16 : (group + 1) * 16], weight_dilation(weight[group * 2 : (group + 1) * 2]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(value: float) -> None:
    weight = torch.randn(3, 4)
    weight[1, 2] = value
    with pytest.raises(NumericError, match="1 values"):
        weight_dilation(weight)


def test_misfits_are_refused() -> None:
    with pytest.raises(UsageError, match="same in-channels"):
        weight_dilation([torch.randn(3, 4), torch.randn(3, 5)])
    with pytest.raises(UsageError, match="groups"):
        weight_dilation(torch.randn(3, 4), groups=2)
    with pytest.raises(UsageError, match="doesn't fit"):
        dilate_weight(torch.randn(4, 4), torch.ones(4), groups=2)
    for cap in (0.5, math.nan, math.inf):
        with pytest.raises(UsageError, match="cap"):
            weight_dilation(torch.randn(3, 4), cap=cap)

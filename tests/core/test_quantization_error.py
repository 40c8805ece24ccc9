"""The parts of a quantization error: exact, exclusive, and equal on histograms."""

from __future__ import annotations

import pytest
import torch

from dqtool.core.affine import affine_parameters, fake_quantize
from dqtool.core.quantization_error import error_parts, histogram_error


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shrink", [0.3, 0.8, 1.0])
def test_the_parts_are_the_whole_error_and_exclude_each_other(bits: int, shrink: float):
    torch.manual_seed(bits)
    x = torch.randn(5, 400)
    scale, zero_point = affine_parameters(x.amin(1) * shrink, x.amax(1) * shrink, bits)
    scale, zero_point = scale[:, None], zero_point[:, None]
    clipping, rounding = error_parts(x, scale, zero_point, bits)
    assert torch.equal(clipping + rounding, (fake_quantize(x, scale, zero_point, bits) - x).square())
    assert not bool(((clipping > 0) & (rounding > 0)).any())
    assert bool((rounding.sqrt() <= scale * 0.501).all())
    assert bool(clipping.any()) == (shrink < 1 or bool(((x.amin(1) < 0) & (x.amax(1) > 0)).any() and clipping.any()))


def test_a_level_outside_nothing_is_no_clipping():
    x = torch.tensor([-3.0, -1.0, 0.4, 1.0, 9.0])
    clipping, rounding = error_parts(x, torch.tensor(1.0), torch.tensor(1.0), bits=2)  # levels -1, 0, 1, 2
    assert clipping.tolist() == [4.0, 0.0, 0.0, 0.0, 49.0]
    assert rounding.tolist() == pytest.approx([0, 0, 0.16, 0, 0])


@pytest.mark.parametrize("bits", [4, 8])
def test_histograms_give_the_error_of_the_values(bits: int):
    torch.manual_seed(0)
    x = torch.randn(3, 200_000) * torch.tensor([[0.5], [1.0], [4.0]])
    lo, hi = x.amin(1), x.amax(1)
    histogram = torch.stack([torch.histc(row, 512, float(a), float(b)) for row, a, b in zip(x, lo, hi, strict=True)])
    scale, zero_point = affine_parameters(lo * 0.6, hi * 0.6, bits)
    clipping, rounding, power = histogram_error(histogram, lo, hi, scale, zero_point, bits)
    expected = [part.sum(1) for part in error_parts(x, scale[:, None], zero_point[:, None], bits)]
    torch.testing.assert_close(clipping, expected[0], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(rounding, expected[1], rtol=0.02, atol=1e-3)
    torch.testing.assert_close(power, x.square().sum(1), rtol=1e-3, atol=0)

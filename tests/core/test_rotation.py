"""Grouped Hadamard rotations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dqtool.core.rotation import SIZES, fitting_sizes, rotate, rotate_weight


def sylvester(size: int) -> torch.Tensor:
    """Return the normalised Hadamard matrix by its definition."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


@pytest.mark.parametrize("size", SIZES)
def test_rotation_is_the_hadamard_matrix_of_each_group(size: int) -> None:
    x = torch.randn(3, 2 * size, 4, 5)
    expected = torch.einsum("ij,ngjhw->ngihw", sylvester(size), x.double().unflatten(1, (2, size))).flatten(1, 2)
    torch.testing.assert_close(rotate(x, size, 1), expected.float())
    torch.testing.assert_close(rotate(x.transpose(1, 3), size), expected.float().transpose(1, 3))
    torch.testing.assert_close(rotate(rotate(x, size, 1), size, 1), x)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("taps", [(), (1, 1), (3, 3)])
def test_a_rotated_layer_is_the_layer(size: int, taps: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 2 * size, *taps)
    turned = rotate_weight(weight, size)
    if taps:
        x = torch.randn(2, 2 * size, 6, 5)
        expected, got = F.conv2d(x, weight, padding=1), F.conv2d(rotate(x, size, 1), turned, padding=1)
    else:
        x = torch.randn(7, 2 * size)
        expected, got = F.linear(x, weight), F.linear(rotate(x, size), turned)
    assert float((got - expected).abs().max() / expected.abs().max()) < 1e-5
    torch.testing.assert_close(rotate_weight(turned, size), weight, rtol=0, atol=2e-7 * float(weight.abs().max()))


def test_an_outlier_spreads_over_its_group() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 8.0
    assert rotate(x, 64).abs().tolist() == [[1.0] * 64]


def test_groups_divide_the_channels() -> None:
    assert list(fitting_sizes(96)) == [32, 16]
    assert list(fitting_sizes(64)) == [64, 32, 16]
    assert list(fitting_sizes(24)) == []
    assert list(fitting_sizes(64, groups=2)) == []
    x = torch.randn(2, 24)
    assert rotate(x, 0) is x

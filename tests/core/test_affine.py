"""Affine quantizer: grids, codes, gradients and the search for ranges."""

from __future__ import annotations

import pytest
import torch

from dqtool.core.affine import (
    affine_parameters,
    centred_codes,
    fake_quantize,
    levels,
    lowest_code,
    search_histogram,
    search_weight,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_grid_contains_zero_exactly_and_covers_the_range(bits: int) -> None:
    lo, hi = torch.tensor([-3.0, 0.5, -2.0, 0.0]), torch.tensor([1.0, 4.0, -0.5, 0.0])
    scale, zero_point = affine_parameters(lo, hi, bits)
    assert (zero_point == zero_point.round()).all()
    assert ((zero_point >= 0) & (zero_point <= levels(bits))).all()
    zero = fake_quantize(torch.zeros(4), scale, zero_point, bits)
    assert (zero == 0).all()
    top = fake_quantize(hi.clamp(min=0), scale, zero_point, bits)
    assert torch.allclose(top, hi.clamp(min=0), atol=float(scale.max()) / 2 + 1e-6)


def test_degenerate_range_gives_scale_one_and_no_nan() -> None:
    scale, zero_point = affine_parameters(torch.zeros(2), torch.zeros(2), 4)
    assert scale.tolist() == [1, 1]
    assert zero_point.tolist() == [0, 0]
    scale, zero_point = affine_parameters(torch.zeros(1), torch.zeros(1), 8, symmetric=True)
    assert (scale.item(), zero_point.item()) == (1, 128)


def test_symmetric_eight_bits_is_centred_and_fits_int8() -> None:
    x = torch.linspace(-2, 2, 1001)
    scale, zero_point = affine_parameters(x.min(), x.max(), 8, symmetric=True)
    codes = centred_codes(x, scale, zero_point, 8, lowest_code(8, symmetric=True))
    assert zero_point == 128
    assert (codes.min(), codes.max()) == (-127, 127)


def test_fake_quantize_is_scale_times_codes_bitwise() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6)
    scale, zero_point = torch.rand(4, 1, 1) + 0.1, torch.randint(0, 15, (4, 1, 1)).float()
    divisor = torch.rand(5, 1) + 1
    assert torch.equal(
        fake_quantize(x, scale, zero_point, 4, divisor=divisor),
        centred_codes(x, scale, zero_point, 4, divisor=divisor) * scale,
    )


def test_training_and_inference_paths_agree_bitwise() -> None:
    torch.manual_seed(0)
    x, scale, zero_point = torch.randn(3, 7), torch.rand(3, 1) + 0.05, torch.full((3, 1), 6.0)
    inference = fake_quantize(x, scale, zero_point, 4)
    assert torch.equal(inference, fake_quantize(x.requires_grad_(), scale, zero_point, 4).detach())


def _reference(x, scale, zero_point, bits, divisor):
    """Fake quantization written with autograd's own rules and detached rounding."""

    def ste(v: torch.Tensor) -> torch.Tensor:
        return v + (v.round() - v).detach()

    code = (ste(x / (scale * divisor)) + ste(zero_point)).clamp(0, levels(bits))
    return scale * (code - ste(zero_point))


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 1, 1, 1), (1, 3, 1, 1), (4, 3, 1, 1)])
def test_gradients_equal_straight_through_autograd(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    scale, zero_point = torch.rand(shape, dtype=torch.float64) * 0.1 + 0.1, torch.full(shape, 7.2, dtype=torch.float64)
    divisor = torch.rand(3, 1, 1, dtype=torch.float64) + 1
    weight = torch.randn_like(x)
    grads = []
    for function in (fake_quantize, _reference):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        y = function(*leaves, 4, 0, divisor) if function is fake_quantize else function(*leaves, 4, divisor)
        (y * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_weight_search_never_loses_to_the_full_range() -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3) ** 3  # heavy tails reward clipping
    scale, zero_point = search_weight(weight, 4, symmetric=False)
    full_scale, full_zero = affine_parameters(weight.flatten(1).amin(1), weight.flatten(1).amax(1), 4)

    def error(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        rows = weight.flatten(1)
        return (fake_quantize(rows, s[:, None], z[:, None], 4) - rows).square().sum(1)

    assert (error(scale, zero_point) <= error(full_scale, full_zero)).all()
    assert error(scale, zero_point).sum() < error(full_scale, full_zero).sum()


def test_histogram_search_finds_a_better_grid_than_the_full_range() -> None:
    torch.manual_seed(0)
    x = torch.nn.functional.silu(torch.randn(2, 20000) * 2)
    lo, hi = x.amin(1), x.amax(1)
    histogram = torch.stack([torch.histc(row, 512, float(a), float(b)) for row, a, b in zip(x, lo, hi, strict=True)])
    scale, zero_point = search_histogram(histogram, lo, hi, 4)
    full = affine_parameters(lo, hi, 4)

    def error(s: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return (fake_quantize(x, s[:, None], z[:, None], 4) - x).square().mean(1)

    assert (error(scale, zero_point) < error(*full)).all()


def test_the_gradient_of_a_divisor_is_that_of_dividing_first() -> None:
    torch.manual_seed(0)
    x, divisor = torch.randn(6, 5, 4, 4), torch.rand(5) + 0.5
    scale, zero_point = torch.rand(6, 1, 1, 1) * 0.2 + 0.1, torch.full((6, 1, 1, 1), 7.0)
    weight = torch.randn_like(x)
    grads = []
    for fused in (True, False):
        leaves = [each.clone().requires_grad_(True) for each in (x, scale, divisor)]
        given, step, s = leaves
        wide = s.view(-1, 1, 1)
        if fused:
            y = fake_quantize(given, step, zero_point, 4, 0, wide)
        else:
            y = fake_quantize(given / wide, step, zero_point, 4)
        (y * weight).sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_search_weight_finds_the_same_grids_in_parts(monkeypatch: pytest.MonkeyPatch):
    weight = torch.randn(37, 24, 3, 3)
    whole = search_weight(weight, 4, symmetric=False)
    monkeypatch.setattr("dqtool.core.affine.AT_ONCE", 5 * 24 * 9)
    for found, expected in zip(search_weight(weight, 4, symmetric=False), whole, strict=True):
        assert torch.equal(found, expected)

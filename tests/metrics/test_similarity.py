import math

import pytest
import torch

from dqtool.core.detail import detail
from dqtool.errors import UsageError
from dqtool.metrics.similarity import PSNR_CAP, detail_ratio, mse, psnr, ssim


def test_values_per_image() -> None:
    a = torch.zeros(3, 1, 4, 4)
    b = a.clone()
    b[1], b[2] = 0.2, 2.0
    assert mse(a, b).tolist() == pytest.approx([0, 0.04, 4])
    assert psnr(a, b, data_range=2).tolist() == pytest.approx([PSNR_CAP, 20, 0], abs=1e-5)
    assert psnr(a, b, data_range=1)[1].item() == pytest.approx(10 * math.log10(25), abs=1e-5)


def test_other_shapes_are_refused() -> None:
    with pytest.raises(UsageError, match="references"):
        psnr(torch.zeros(2, 1, 4, 4), torch.zeros(3, 1, 4, 4), 1)


def slow_ssim(x: torch.Tensor, y: torch.Tensor, data_range: float) -> float:
    """The definition on one channel, window by window."""
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(place**2) / (2 * 1.5**2))
    weight = torch.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for i in range(x.shape[0] - 10):
        for j in range(x.shape[1] - 10):
            a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
            both = (weight * (a - mean_a) * (b - mean_b)).sum()
            values.append(
                (2 * mean_a * mean_b + c1) * (2 * both + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
            )
    return float(torch.stack(values).mean())


def test_ssim_is_the_definition() -> None:
    a = torch.rand(3, 2, 14, 13, dtype=torch.float64)
    b = (a + 0.3 * torch.randn(a.shape, dtype=torch.float64)).clamp(0, 1)
    expected = [sum(slow_ssim(x, y, 1.0) for x, y in zip(m, n, strict=True)) / 2 for m, n in zip(a, b, strict=True)]
    assert ssim(a, b, 1.0, batch_size=2).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("side", [1, 2, 8, 16])
def test_ssim_of_equal_and_opposite_images(side: int) -> None:
    a = torch.rand(2, 1, side, side)
    assert ssim(a, a, 1.0).tolist() == pytest.approx([1, 1])
    assert (ssim(a, 1 - a, 1.0) < 1).all()


def test_ssim_needs_pairs() -> None:
    with pytest.raises(UsageError):
        ssim(torch.rand(2, 1, 8, 8), torch.rand(3, 1, 8, 8), 1.0)
    with pytest.raises(UsageError):
        ssim(torch.rand(2, 8), torch.rand(2, 8), 1.0)


def test_softer_images_have_less_detail_whatever_their_order() -> None:
    images = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    soft = images - 0.2 * detail(images)
    assert detail_ratio(images.flip(0), images) == pytest.approx(1)
    assert detail_ratio(2 * images, images) == pytest.approx(4)
    assert 0.4 < detail_ratio(soft, images) < 0.9
    assert detail_ratio(images, torch.ones(4, 1, 8, 8)) == 1.0

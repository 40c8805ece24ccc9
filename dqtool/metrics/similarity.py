"""Similarity of images to their references, image by image: PSNR, SSIM and the power of detail."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.artifacts.jsonvalues import Json
from dqtool.core.detail import detail
from dqtool.errors import UsageError

__all__ = ["PSNR_CAP", "compare_images", "detail_ratio", "mse", "psnr", "ssim"]

PSNR_CAP = 100.0
"""Largest PSNR in dB, reported for images that are equal or differ by float32 noise only. It keeps means finite."""

BATCH = 256
"""Images compared at once."""


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean squared difference of each image, `[N]` float64, of `a` and `b` `[N, ...]`.

    Raises:
        UsageError: the shapes differ.
    """
    if a.shape != b.shape or a.ndim < 2:
        raise UsageError(
            f"Images can only be compared with as many references of the same size, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}.",
            fix="Compare with samples of the same count, from a model of the same resolution.",
        )
    pairs = zip(
        a.detach().split(BATCH), b.detach().split(BATCH), strict=True
    )  # in parts, since the set may fill the memory
    return torch.cat([(x.double() - y.double()).square().flatten(1).mean(dim=1) for x, y in pairs])


def psnr(a: Tensor, b: Tensor, data_range: float) -> Tensor:
    """Return the peak signal-to-noise ratio of each image in dB, `[N]` float64, at most `PSNR_CAP`.

    `data_range` is the distance between black and white: 2 for images in [-1, 1], 1 for [0, 1], 255 for bytes.
    """
    return (10 * torch.log10(data_range**2 / mse(a, b))).clamp(max=PSNR_CAP)


SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def ssim(a: Tensor, b: Tensor, data_range: float, *, batch_size: int = 64) -> Tensor:
    """Return the structural similarity of each image, `[N]` float64 in [-1, 1], of `a` and `b` `[N, C, H, W]`.

    Implements Eq. 13 of Wang et al. 2004 with a Gaussian window of 11 pixels and sigma 1.5, K1 = 0.01 and K2 = 0.03.
    The result is averaged over channels and over the positions where the window fits. Images under 11 pixels use the
    largest odd window that fits.

    Raises:
        UsageError: the shapes differ, or the images do not have four dimensions.
    """
    if a.shape != b.shape or a.ndim != 4:
        mse(a, b)
        raise UsageError(f"SSIM compares images [N, C, H, W], got {tuple(a.shape)}.")
    side = min(a.shape[2], a.shape[3], SSIM_WINDOW)
    side -= 1 - side % 2
    place = torch.arange(side, dtype=torch.float64) - side // 2
    line = torch.exp(-place.square() / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2

    def blur(x: Tensor) -> Tensor:  # every channel by itself
        flat = x.flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(flat, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1)).view(*x.shape[:2], -1)

    values = []
    for part, other in zip(a.detach().split(batch_size), b.detach().split(batch_size), strict=True):
        x, y = part.double().cpu(), other.double().cpu()
        mean_x, mean_y = blur(x), blur(y)
        var_x, var_y = blur(x * x) - mean_x.square(), blur(y * y) - mean_y.square()
        covariance = blur(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
        structure = (2 * covariance + c2) / (var_x + var_y + c2)
        values.append((luminance * structure).mean(dim=(1, 2)))
    return torch.cat(values)


def detail_ratio(a: Tensor, b: Tensor) -> float:
    """Return the power of fine detail (`dqtool.core.detail`) in images `a` `[N, C, H, W]` divided by that in `b`.

    A ratio below 1 means that the images are softer as a set, even if each is close to its reference. The ratio is 1 if
    `b` has no detail.
    """

    def power(images: Tensor) -> float:
        return sum(float(detail(part.double()).square().sum()) for part in images.detach().split(BATCH)) / len(images)

    of_reference = power(b)
    return power(a) / of_reference if of_reference > 0 else 1.0


def compare_images(images: Tensor, expected: Tensor | None, _asked: Tensor | None) -> dict[str, Json]:
    """Return PSNR, SSIM (mean and median) and the detail ratio of `images` `[N, C, H, W]` in [-1, 1] against
    `expected`.

    Nothing is returned without `expected`. Frames of videos `[N, C, F, H, W]` count as channels. Samples with fewer
    dimensions (sounds, embeddings) have a PSNR only.
    """
    if expected is None:
        return {}
    if images.dim() > 4:
        images, expected = images.flatten(1, -3), expected.flatten(1, -3)
    figures: dict[str, Json] = {}
    for name, measure in (("psnr", psnr), ("ssim", ssim)):
        if name == "ssim" and images.dim() < 4:
            return figures
        values = measure(images, expected, 2.0)
        figures[name] = {"mean": float(values.mean()), "median": float(values.median())}
    figures["detail_power"] = detail_ratio(images, expected)
    return figures

"""Conditions from images: masks and masked latents for inpainting, latents for editing, starts for img2img."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.errors import UsageError

__all__ = ["EncodedImages", "beside_latents", "random_masks"]

LEAST, MOST = 0.25, 0.75
"""Sides of a random mask, as shares of the image's."""


@dataclass(frozen=True)
class EncodedImages:
    """Images `[N, C, H, W]` in [-1, 1] and the autoencoder that makes latents of them.

    `encode` returns latents `[N, C, h, w]` as the autoencoder makes them; `scaled` makes samples of the denoiser of them.
    """

    images: Tensor
    encode: Callable[[Tensor], Tensor]
    scaled: Callable[[Tensor], Tensor]

    def starts(self) -> Tensor:
        """Return the images as samples of the denoiser, `[N, C, h, w]`."""
        return self.scaled(self.encode(self.images))


def beside_latents(given: EncodedImages, channels: int, rows: int, seed: int) -> Tensor:
    """Return the channels that stand beside the latents, `[min(rows, N), channels, h, w]`.

    As diffusers' pipelines make them: for inpainting a mask (1 where it paints) and the scaled latents of the image with
    zeros in its place; for editing the latents of the image, not scaled. Masks are random rectangles.
    """
    images = given.images[: min(rows, len(given.images))]
    plain = given.encode(images)
    if channels == plain.shape[1]:
        return plain
    if channels != plain.shape[1] + 1:
        raise UsageError(
            f"dqtool does not know what stands in the {channels} channels beside the latents of this network",
            where="--images",
            fix="Give --conditions FILE with the tensor beside_latents [K, C, H, W]",
        )
    masks = random_masks(len(images), images.shape[2], seed)
    hidden = given.scaled(given.encode(images * (masks < 0.5)))
    return torch.cat([F.interpolate(masks, size=hidden.shape[2:]), hidden], 1)


def random_masks(count: int, side: int, seed: int) -> Tensor:
    """Return masks `[count, 1, side, side]` that are 1 in a rectangle, whose place and sides `seed` draws."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, 1, side, side)
    for mask in masks:
        spans = []
        for _ in range(2):
            share, place = torch.rand(2, generator=generator).tolist()
            length = max(1, round(side * (LEAST + (MOST - LEAST) * share)))
            first = round((side - length) * place)
            spans.append(slice(first, first + length))
        mask[0, spans[0], spans[1]] = 1
    return masks

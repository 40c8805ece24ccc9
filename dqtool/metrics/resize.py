"""The two resize operations that published metrics depend on: TensorFlow 1's bilinear one and the ADM suite's centre
crop."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["bilinear_tensorflow", "center_crop", "center_crops"]


def bilinear_tensorflow(images: Tensor, height: int, width: int) -> Tensor:
    """Resize float images `[N, C, H, W]` to `[N, C, height, width]` like TensorFlow 1's
    `resize_bilinear(align_corners=False)`.

    Output pixel i reads the input at i * H / height, without half-pixel offset or antialiasing. Every FID of the 2015
    graph uses it. The order of the float32 operations is that of TensorFlow's kernel.
    """
    left, right, across = _taps(images.shape[3], width)
    top, bottom, down = _taps(images.shape[2], height)
    columns = images[..., left]
    columns = columns + (images[..., right] - columns) * across.to(images)
    rows = columns[..., top, :]
    return rows + (columns[..., bottom, :] - rows) * down.to(images)[:, None]


def _taps(size: int, new_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lower and the upper input index of each output index, and the weight of the upper one."""
    # TensorFlow's kernel multiplies in float32. In float64 some positions land on the other side of an integer.
    position = torch.arange(new_size, dtype=torch.float32) * torch.tensor(size / new_size, dtype=torch.float32)
    lower = position.long().clamp(max=size - 1)
    return lower, (lower + 1).clamp(max=size - 1), position - lower


def center_crop(image: Image, size: int) -> Image:
    """Return the `size` x `size` centre of an image whose shorter side is resized to `size`, as ADM prepares ImageNet.

    A box filter halves the image while its shorter side is at least twice `size`; a bicubic filter does the rest.
    """
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Resampling.BOX)
    if min(image.size) != size:
        scale = size / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def center_crops(images: Tensor, size: int) -> Tensor:
    """Return `center_crop` of each image, of uint8 `[N, H, W, C]` with one or three channels."""
    import numpy as np
    from PIL import Image

    if images.shape[1:3] == (size, size):
        return images
    grey = images.shape[3] == 1
    arrays = [image.squeeze(-1).numpy() if grey else image.numpy() for image in images.contiguous()]
    cropped = [np.array(center_crop(Image.fromarray(array), size)) for array in arrays]
    return torch.from_numpy(np.stack(cropped)).view(len(images), size, size, images.shape[3])

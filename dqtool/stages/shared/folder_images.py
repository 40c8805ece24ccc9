"""Images of `--images DIR`, in the size of a model and with its autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dqtool.errors import UsageError

if TYPE_CHECKING:
    from dqtool.models.components.companions import Companions
    from dqtool.models.conditions.images import EncodedImages

__all__ = ["encoded_images"]

FIRST_IMAGES = 256
"""Images that are read of a folder, in the order of their names."""


def encoded_images(folder: str, sample: tuple[int, ...], companions: Companions | None) -> EncodedImages:
    """Return the images of a folder, cropped to the size of a model with samples `(C, H, W)`.

    Raises:
        EnvironmentFault: there is no such folder.
        ArtifactError: it holds no images, or damaged ones.
        UsageError: the samples are latents and the model comes without an autoencoder, or they are no squares.
    """
    import torch

    from dqtool.metrics.batches import ImageFolder
    from dqtool.models.conditions.images import EncodedImages

    shape = sample if companions is None else companions.image_shape(sample)
    source = ImageFolder(folder, shape[-1])
    coder = None if companions is None else companions.encoder()
    if coder is None and shape[0] not in (1, 3):
        raise UsageError(
            "Images need the autoencoder that makes latents of them, and this model comes without one",
            where=f"--images {folder}",
            fix="Start from a pipeline directory",
        )
    if len(shape) != 3 or shape[1] != shape[2]:
        raise UsageError("Images are cropped to squares, and this model's are none", where=f"--images {folder}")
    source.paths = source.paths[:FIRST_IMAGES]
    pixels = torch.cat(list(source.read(16))).movedim(-1, 1).float() / 127.5 - 1
    if shape[0] == 1:
        pixels = pixels.mean(1, keepdim=True)
    return EncodedImages(pixels, *(coder or (lambda x: x, lambda x: x)))

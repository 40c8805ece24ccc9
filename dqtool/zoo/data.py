"""Training data of the embedded models: scikit-learn's handwritten digits, and Fashion-MNIST of Debian's package."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.errors import ArtifactError, EnvironmentFault

__all__ = ["FASHION", "GARMENTS", "digits", "fashion"]

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Directory of Debian's package dataset-fashion-mnist."""
SPLITS = (("train", "train", 60_000), ("held_out", "t10k", 10_000))
"""Name, stem of the files and number of images of each of its parts."""
GARMENTS = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Classes of Fashion-MNIST, in the order of its labels."""


def digits(resolution: int = 16, seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the 1797 digits, split by class into ``train`` (1347) and ``held_out`` (450).

    The result is ``{split: (images, labels)}`` with images ``[N, 1, R, R]`` float32 in [-1, 1] (8x8 scans with 17 grey
    levels, enlarged bicubically) and labels ``[N]`` int64. Only this function needs scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(resolution, resolution), mode="bicubic", align_corners=False)
    images = images.clamp(0, 1) * 2 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    train, held_out = train_test_split(range(len(labels)), test_size=450, stratify=data.target, random_state=seed)
    return {"train": (images[train], labels[train]), "held_out": (images[held_out], labels[held_out])}


def fashion(folder: Path = FASHION) -> dict[str, tuple[Tensor, Tensor]]:
    """Return Fashion-MNIST: 60,000 images in ``train`` and 10,000 in ``held_out``, with labels `[N]` int64.

    Images are `[N, 1, 32, 32]` float32 in [-1, 1]: 28x28 photographs on black, with a border of two black pixels.

    Raises:
        EnvironmentFault: the data set is not installed.
        ArtifactError: a file is no table of bytes of the expected size.
    """
    found = {}
    for split, stem, count in SPLITS:
        pixels = _bytes_of(folder / f"{stem}-images-idx3-ubyte.gz", (count, 28, 28))
        labels = _bytes_of(folder / f"{stem}-labels-idx1-ubyte.gz", (count,))
        images = F.pad(pixels[:, None].float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
        found[split] = (images, labels.long())
    return found


def _bytes_of(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Return a gzipped IDX file of bytes, uint8 of this shape. Its header: two zeros, type 8, dimensions, sizes."""
    if not path.is_file():
        raise EnvironmentFault(
            "Fashion-MNIST is not installed", where=str(path), fix="apt-get install dataset-fashion-mnist"
        )
    header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
    total = len(header) + torch.Size(shape).numel()
    with gzip.open(path) as file:
        content = file.read(total + 1)
    if len(content) != total or content[: len(header)] != header:
        raise ArtifactError(f"This is no IDX file of bytes of shape {list(shape)}", where=str(path))
    return torch.frombuffer(bytearray(content[len(header) :]), dtype=torch.uint8).reshape(shape)

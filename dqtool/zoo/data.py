"""Training data of the embedded models: scikit-learn's handwritten digits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["digits"]


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

"""Garment classifier behind `fd.garments`, `is.garments` and the recognised class of each image of `zoo:fashion`."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.metrics.classifiers import ImageClassifier

__all__ = ["GARMENTS", "GarmentClassifier", "compare", "distance"]

FEATURES = 64


class GarmentClassifier(nn.Module):
    """Convolutional network for `[N, 1, 32, 32]` in [-1, 1]: 317 K parameters, without normalisation.

    The buffers are statistics of the features of Fashion-MNIST's training images, as in `ImageClassifier`.
    """

    reference_mean: Tensor
    reference_cov: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 96, 3, padding=1)
        self.conv4 = nn.Conv2d(96, 128, 3, padding=1)
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(128 * 4 * 4, FEATURES)
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("reference_mean", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("reference_cov", torch.zeros(FEATURES, FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `[N, 64]` and logits `[N, 10]`."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # [N, 32, 16, 16]
        x = F.relu(self.conv2(x))
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # [N, 96, 8, 8]
        x = F.max_pool2d(F.relu(self.conv4(x)), 2)  # [N, 128, 4, 4]
        hidden = F.gelu(self.hidden(self.dropout(x.flatten(1))))
        return hidden, self.head(hidden)


GARMENTS = ImageClassifier(
    "garments", "garment", GarmentClassifier, Path(__file__).parent / "weights" / "garments-classifier.safetensors", 32
)
compare, distance = GARMENTS.compare, GARMENTS.distance

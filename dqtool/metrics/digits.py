"""Digit classifier behind `fd.digits`, `is.digits` and the recognised digit of each image (`dqtool.zoo.train_classifier`)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.metrics.classifiers import ImageClassifier

__all__ = ["DIGITS", "DigitClassifier", "compare", "distance"]

FEATURES = 32


class DigitClassifier(nn.Module):
    """Convolutional network for `[N, 1, 16, 16]` in [-1, 1]: 54 K parameters, without normalisation or dropout.

    The buffers `reference_mean` `[32]` and `reference_cov` `[32, 32]`, float64, are statistics of the features of the
    real training digits, which `fd.digits` compares with.
    """

    reference_mean: Tensor
    reference_cov: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.conv3 = nn.Conv2d(32, 48, 3, padding=1)
        self.conv4 = nn.Conv2d(48, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 2 * 2, FEATURES)
        self.head = nn.Linear(FEATURES, 10)
        self.register_buffer("reference_mean", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("reference_cov", torch.zeros(FEATURES, FEATURES, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features `[N, 32]` (after a GELU, since a ReLU left a quarter of them dead) and logits `[N, 10]`."""
        x = F.relu(self.conv1(x))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # [N, 32, 8, 8]
        x = F.max_pool2d(F.relu(self.conv3(x)), 2)  # [N, 48, 4, 4]
        x = F.max_pool2d(F.relu(self.conv4(x)), 2)  # [N, 64, 2, 2]
        hidden = F.gelu(self.hidden(x.flatten(1)))
        return hidden, self.head(hidden)


DIGITS = ImageClassifier(
    "digits", "digit", DigitClassifier, Path(__file__).parent / "weights" / "digits-classifier.safetensors", 16
)
compare, distance = DIGITS.compare, DIGITS.distance

"""Small digit classifier and the scores based on it: `fd.digits`, `is.digits` and the recognised digit of each image.

Its features replace those of InceptionV3 for the embedded models. The figures have names of their own, are never
reported as FID or IS, and are reported together with the classifier's hash.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts.jsonvalues import Json
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.metrics.figures import value_of
from dqtool.metrics.frechet import frechet_distance, minimum_samples, statistics
from dqtool.metrics.inception_score import inception_score

__all__ = [
    "CONFIDENT",
    "WEIGHTS",
    "DigitClassifier",
    "classify",
    "compare_digits",
    "describe",
    "evaluate_digits",
    "features",
    "load",
]

WEIGHTS = Path(__file__).parent / "weights" / "digits-classifier.safetensors"
CONFIDENT = 0.9  # softmax maximum above which an image counts as read with confidence
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


@lru_cache(maxsize=1)
def load() -> DigitClassifier:
    """Return the packaged classifier on the CPU, frozen. All callers share one instance, which must not be modified.

    Raises:
        EnvironmentFault: the weights are missing.
        ArtifactError: the weights are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        state = from_bytes(WEIGHTS.read_bytes())
        model = DigitClassifier()
        model.load_state_dict(state)
    except FileNotFoundError as error:
        raise EnvironmentFault(
            "The weights of the digit classifier are missing.", where=str(WEIGHTS), fix="Reinstall dqtool."
        ) from error
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(
            "The weights of the digit classifier are damaged.", where=str(WEIGHTS), fix="Reinstall dqtool."
        ) from error
    return model.eval().requires_grad_(False)


def describe() -> dict[str, Json]:
    """Return the extractor's entry in reports: `{"name", "sha256", "features"}`, with the hash of the weights file."""
    return {
        "name": "digits-classifier",
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
        "features": FEATURES,
    }


def distance(images: Tensor, others: Tensor) -> float:
    """Return the Fréchet distance between the features of two sets of images, `[N, 1, 16, 16]` and `[M, 1, 16, 16]` in
    [-1, 1].

    If two models make the images from the same noise, the distance is 0 at any N where the models agree. Pairs that
    show different things add a bias that falls as 1 / N, so distances are comparable at equal N only.
    """
    return frechet_distance(*statistics(features(images)[0]), *statistics(features(others)[0]))


@torch.no_grad()
def features(images: Tensor, *, batch_size: int = 512, model: DigitClassifier | None = None) -> tuple[Tensor, Tensor]:
    """Return features `[N, 32]` and logits `[N, 10]` (float32, CPU) of `images` `[N, 1, H, W]` in [-1, 1].

    Images of other sizes than 16 x 16 are resized with antialiasing and clamped to [-1, 1].

    Raises:
        UsageError: the images do not have one channel, or there are none.
    """
    if images.ndim != 4 or images.shape[1] != 1 or len(images) == 0:
        raise UsageError(
            f"The digit metrics need images [N, 1, H, W] with N >= 1, got {tuple(images.shape)}.",
            fix="Leave digits out of --metrics for this model.",
        )
    model = load() if model is None else model
    images = images.detach().float().cpu()
    if images.shape[-2:] != (16, 16):
        images = F.interpolate(images, size=(16, 16), mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
    parts = [model(part) for part in images.split(batch_size)]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def classify(images: Tensor, *, batch_size: int = 512) -> tuple[Tensor, Tensor]:
    """Return the most likely digit of each image, `[N]` int64, and its softmax probability, `[N]` float32."""
    confidence, labels = features(images, batch_size=batch_size)[1].softmax(dim=1).max(dim=1)
    return labels, confidence


def evaluate_digits(images: Tensor, *, splits: int = 10) -> dict[str, Json]:
    """Return all digit scores of `images` `[N, 1, 16, 16]` in [-1, 1].

    `fd.digits` is the Fréchet distance to the real training digits. `is.digits` and `is.digits.std` are the Inception
    score over `splits`. `confident_share` is the share of images classified with a probability above 0.9. `extractor`
    is described by `describe`.
    """
    model = load()
    hidden, logits = features(images)
    mean, cov = statistics(hidden)
    score, deviation = inception_score(logits, splits)
    confidence = logits.softmax(dim=1).amax(dim=1)
    return {
        "fd.digits": frechet_distance(mean, cov, model.reference_mean, model.reference_cov),
        "is.digits": score,
        "is.digits.std": deviation,
        "confident_share": (confidence > CONFIDENT).double().mean().item(),
        "samples": len(images),
        "extractor": describe(),
    }


def compare_digits(images: Tensor, expected: Tensor | None, asked: Tensor | None) -> dict[str, Json]:
    """Return the digit figures of `images` `[N, 1, 16, 16]` and, given `expected` images, their figures and
    comparisons.

    The figures of `expected` are in `reference`. `asked` `[N]` is the digit that each image should show. A warning is
    shown for small N.
    """
    if len(images) < minimum_samples(FEATURES):
        report.warn(f"fd.digits of {len(images)} images is biased upwards; use {minimum_samples(FEATURES)} or more")
    figures = _with_requested(images, asked)
    if expected is not None:
        figures["reference"] = reference = _with_requested(expected, asked)
        figures["fd.digits_from_reference"] = distance(images, expected)
        own, full = value_of(figures, "fd.digits"), value_of(reference, "fd.digits")
        if own is not None and full:
            figures["fd.digits_ratio"] = own / full
        same = classify(images)[0] == classify(expected)[0]
        figures["same_digit_share"] = float(same.float().mean())
    return figures


def _with_requested(images: Tensor, asked: Tensor | None) -> dict[str, Json]:
    """Return the digit figures of `images`, and the share that shows the digit asked for."""
    figures = evaluate_digits(images)
    if asked is not None:
        figures["asked_digit_share"] = float((classify(images)[0] == asked).float().mean())
    return figures

"""Small classifiers of the embedded models' images, and the scores based on them: `fd.NAME`, `is.NAME`, recognised classes.

Their features replace those of InceptionV3 for the embedded models. The figures have names of their own, are never
reported as FID or IS, and are reported together with the classifier's hash. A classifier is a module such as `digits.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool import report
from dqtool.artifacts.jsonvalues import Json
from dqtool.errors import ArtifactError, EnvironmentFault, UsageError
from dqtool.metrics.figures import value_of
from dqtool.metrics.frechet import frechet_distance, minimum_samples, statistics
from dqtool.metrics.inception_score import inception_score

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

__all__ = ["CONFIDENT", "ImageClassifier"]

CONFIDENT = 0.9
"""Softmax maximum above which an image counts as read with confidence."""


@dataclass(frozen=True)
class ImageClassifier:
    """Classifier of images of one channel.

    Attributes:
        name: second part of the figures' names (`digits` in `fd.digits`).
        one: word for one thing of a class (`digit`).
        network: function that returns the module, which maps images `[N, 1, S, S]` in [-1, 1] to features `[N, D]` and
            logits `[N, C]`, and has the buffers `reference_mean` `[D]` and `reference_cov` `[D, D]`, float64: statistics
            of the features of real training images, which `fd.NAME` compares with.
        weights: file of its weights.
        side: side S of the images.
    """

    name: str
    one: str
    network: Callable[[], nn.Module]
    weights: Path
    side: int

    def load(self) -> nn.Module:
        """Return the packaged classifier on the CPU, frozen. All callers share one instance, which must not be modified.

        Raises:
            EnvironmentFault: the weights are missing.
            ArtifactError: the weights are damaged.
        """
        return _load(self)

    def describe(self) -> dict[str, Json]:
        """Return the extractor's entry in reports: `{"name", "sha256", "features"}`, with the hash of the weights file."""
        return {
            "name": f"{self.name}-classifier",
            "sha256": hashlib.sha256(self.weights.read_bytes()).hexdigest(),
            "features": self._width,
        }

    def distance(self, images: Tensor, others: Tensor) -> float:
        """Return the Fréchet distance between the features of two sets of images, `[N, 1, H, W]` and `[M, 1, H, W]` in
        [-1, 1].

        If two models make the images from the same noise, the distance is 0 at any N where the models agree. Pairs that
        show different things add a bias that falls as 1 / N, so distances are comparable at equal N only.
        """
        return frechet_distance(*statistics(self.features(images)[0]), *statistics(self.features(others)[0]))

    @torch.no_grad()
    def features(
        self, images: Tensor, *, batch_size: int = 512, model: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return features `[N, D]` and logits `[N, C]` (float32, CPU) of `images` `[N, 1, H, W]` in [-1, 1].

        Images of another size are resized with antialiasing and clamped to [-1, 1].

        Raises:
            UsageError: the images do not have one channel, or there are none.
        """
        if images.ndim != 4 or images.shape[1] != 1 or len(images) == 0:
            raise UsageError(
                f"The {self.one} metrics need images [N, 1, H, W] with N >= 1, got {tuple(images.shape)}.",
                fix=f"Leave {self.name} out of --metrics for this model.",
            )
        model = self.load() if model is None else model
        images = images.detach().float().cpu()
        size = (self.side, self.side)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size=size, mode="bicubic", align_corners=False, antialias=True).clamp(-1, 1)
        parts = [model(part) for part in images.split(batch_size)]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def classify(self, images: Tensor, *, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """Return the most likely class of each image, `[N]` int64, and its softmax probability, `[N]` float32."""
        confidence, labels = self.features(images, batch_size=batch_size)[1].softmax(dim=1).max(dim=1)
        return labels, confidence

    def evaluate(self, images: Tensor, *, splits: int = 10) -> dict[str, Json]:
        """Return all scores of `images` `[N, 1, H, W]` in [-1, 1].

        `fd.NAME` is the Fréchet distance to the real training images. `is.NAME` and `is.NAME.std` are the Inception
        score over `splits`. `confident_share` is the share of images classified with a probability above 0.9.
        `extractor` is described by `describe`.
        """
        model = self.load()
        hidden, logits = self.features(images)
        mean, cov = statistics(hidden)
        score, deviation = inception_score(logits, splits)
        confidence = logits.softmax(dim=1).amax(dim=1)
        reference: list[Tensor] = [model.get_buffer("reference_mean"), model.get_buffer("reference_cov")]
        return {
            f"fd.{self.name}": frechet_distance(mean, cov, *reference),
            f"is.{self.name}": score,
            f"is.{self.name}.std": deviation,
            "confident_share": (confidence > CONFIDENT).double().mean().item(),
            "samples": len(images),
            "extractor": self.describe(),
        }

    def compare(self, images: Tensor, expected: Tensor | None, asked: Tensor | None) -> dict[str, Json]:
        """Return the figures of `images` `[N, 1, H, W]` and, given `expected` images, their figures and comparisons.

        The figures of `expected` are in `reference`. `asked` `[N]` is the class that each image should show. A warning
        is shown for small N.
        """
        least = minimum_samples(self._width)
        if len(images) < least:
            report.warn(f"fd.{self.name} of {len(images)} images is biased upwards; use {least} or more")
        figures = self._with_requested(images, asked)
        if expected is not None:
            figures["reference"] = reference = self._with_requested(expected, asked)
            figures[f"fd.{self.name}_from_reference"] = self.distance(images, expected)
            own, full = value_of(figures, f"fd.{self.name}"), value_of(reference, f"fd.{self.name}")
            if own is not None and full:
                figures[f"fd.{self.name}_ratio"] = own / full
            same = self.classify(images)[0] == self.classify(expected)[0]
            figures[f"same_{self.one}_share"] = float(same.float().mean())
        return figures

    @property
    def _width(self) -> int:
        return len(self.load().get_buffer("reference_mean"))

    def _with_requested(self, images: Tensor, asked: Tensor | None) -> dict[str, Json]:
        """Return the figures of `images`, and the share that shows the class asked for."""
        figures = self.evaluate(images)
        if asked is not None:
            figures[f"asked_{self.one}_share"] = float((self.classify(images)[0] == asked).float().mean())
        return figures


@lru_cache(maxsize=4)
def _load(classifier: ImageClassifier) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    name, where = f"the {classifier.one} classifier", str(classifier.weights)
    try:
        state = from_bytes(classifier.weights.read_bytes())
        model = classifier.network()
        model.load_state_dict(state)
    except FileNotFoundError as error:
        raise EnvironmentFault(f"The weights of {name} are missing.", where=where, fix="Reinstall dqtool.") from error
    except (SafetensorError, RuntimeError) as error:
        raise ArtifactError(f"The weights of {name} are damaged.", where=where, fix="Reinstall dqtool.") from error
    return model.eval().requires_grad_(False)

"""Accumulators of the metrics: each takes the features of a set of images batch by batch and returns figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dqtool.errors import UsageError
from dqtool.metrics.aesthetic import load_aesthetic_head
from dqtool.metrics.clip import clip_score
from dqtool.metrics.frechet import RunningStatistics, frechet_distance
from dqtool.metrics.inception_score import RunningInceptionScore
from dqtool.metrics.manifold import Manifold, precision_recall

if TYPE_CHECKING:
    from dqtool.metrics.registry import Measurement

__all__ = ["AestheticScore", "ClipScore", "Fid", "FidFromReference", "InceptionScore", "PrecisionRecall", "SpatialFid"]

Figures = dict[str, float]


class Fid:
    """Fréchet distance of `pool_3` to the reference statistics."""

    figure, output = "fid", "pool_3"

    def __init__(self, meter: Measurement) -> None:
        self._reference = meter.reference.statistics(self.output)
        self._running = RunningStatistics()

    def update(self, features: Mapping[str, Tensor]) -> None:
        self._running.update(features[self.output])

    def finish(self) -> Figures:
        return {self.figure: frechet_distance(*self._running.finish(), *self._reference)}


class FidFromReference:
    """Fréchet distance of `pool_3` to the reference model's images of the same noise.

    It measures the effect of quantization on the distribution, without the distance of the full-precision model itself.
    The reference model's images must be measured first; without them there is no figure.
    """

    figure, output = "fid_from_reference", "pool_3"

    def __init__(self, meter: Measurement) -> None:
        self._meter = meter
        self._running = RunningStatistics()

    def update(self, features: Mapping[str, Tensor]) -> None:
        self._running.update(features[self.output])

    def finish(self) -> Figures:
        found = self._running.finish()
        if self._meter.measures_reference:
            self._meter.reference_model[self.output] = found
            return {}
        expected = self._meter.reference_model.get(self.output)
        return {} if expected is None else {self.figure: frechet_distance(*found, *expected)}


class SpatialFid(Fid):
    """Fréchet distance of `mixed_6/conv` to the reference statistics (Nash et al., arXiv 2103.03841)."""

    figure, output = "sfid", "mixed_6"


class InceptionScore:
    """Inception score over parts of 5000 images."""

    def __init__(self, meter: Measurement) -> None:
        self._running = RunningInceptionScore()

    def update(self, features: Mapping[str, Tensor]) -> None:
        self._running.update(features["logits"])

    def finish(self) -> Figures:
        score, deviation = self._running.finish()
        return {"is": score, "is.std": deviation}


class PrecisionRecall:
    """Precision and recall on `pool_3` with the suite's distances. Keeps every feature, 8 KiB an image."""

    def __init__(self, meter: Measurement) -> None:
        self._reference = meter.reference
        self._reference.check_images()
        self._features: list[Tensor] = []

    def update(self, features: Mapping[str, Tensor]) -> None:
        self._features.append(features["pool_3"])

    def finish(self) -> Figures:
        samples = Manifold.of(torch.cat(self._features), half=True)
        precision, recall = precision_recall(self._reference.manifold, samples)
        return {"precision": precision, "recall": recall}


class _Mean:
    """Mean of a score over all images."""

    figure: str

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def scores(self, features: Mapping[str, Tensor]) -> Tensor:
        """Return the score of each image, `[n]`."""
        raise NotImplementedError

    def update(self, features: Mapping[str, Tensor]) -> None:
        scores = self.scores(features)
        self._sum += float(scores.double().sum())
        self._count += len(scores)

    def finish(self) -> Figures:
        return {self.figure: self._sum / self._count}


class ClipScore(_Mean):
    """Mean CLIP score of images and their prompts."""

    figure = "clip"

    def __init__(self, meter: Measurement) -> None:
        super().__init__()

    def scores(self, features: Mapping[str, Tensor]) -> Tensor:
        if "text" not in features:
            raise UsageError("The CLIP score needs images made from prompts", where="--metrics")
        return clip_score(features["image"], features["text"])


class AestheticScore(_Mean):
    """Mean aesthetic score of images."""

    figure = "aesthetic"

    def __init__(self, meter: Measurement) -> None:
        super().__init__()
        assert meter.files.aesthetic_weights is not None
        encoder: Any = meter.extractors["clip"]
        self._head = load_aesthetic_head(meter.files.aesthetic_weights, encoder.encoder.features)

    @torch.no_grad()
    def scores(self, features: Mapping[str, Tensor]) -> Tensor:
        result: Tensor = self._head(features["image"])[:, 0]
        return result

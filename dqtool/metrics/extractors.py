"""Networks that read images for the metrics, loaded from the user's files."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from dqtool.artifacts.jsonvalues import Json
from dqtool.core.device import place, to_cpu, to_device_of
from dqtool.metrics.clip import ClipEncoder
from dqtool.metrics.inception_weights import load_inception, weights_digest
from dqtool.metrics.registry import path_digest

__all__ = ["ClipExtractor", "InceptionExtractor"]

BATCH = 32
"""Images that run through a network together."""


class InceptionExtractor:
    """FID's Inception network with its three outputs. Prompts are ignored."""

    def __init__(self, path: str) -> None:
        self.model = load_inception(path)
        self.weights_sha256 = weights_digest(self.model)
        self.model = place(self.model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
        self._about: dict[str, Json] = {
            "name": "inception-2015-12-05",
            "file": os.path.basename(path),
            "sha256": path_digest(path),
        }

    def describe(self) -> dict[str, Json]:
        return self._about

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: list[str] | None = None) -> Mapping[str, Tensor]:
        rgb = images.expand(*images.shape[:3], 3).permute(0, 3, 1, 2)
        parts = [to_cpu(self.model(to_device_of(self.model, part))) for part in rgb.split(BATCH)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class ClipExtractor:
    """CLIP's unit embeddings: `image` `[n, D]` and, with prompts, `text` `[n, D]`."""

    def __init__(self, path: str) -> None:
        self.encoder = ClipEncoder(path)
        place(self.encoder.model)
        self._about: dict[str, Json] = {
            "name": "clip",
            "file": os.path.basename(os.path.normpath(path)),
            "sha256": path_digest(path),
        }

    def describe(self) -> dict[str, Json]:
        return self._about

    @torch.no_grad()
    def __call__(self, images: Tensor, texts: list[str] | None = None) -> Mapping[str, Tensor]:
        rgb = images.expand(*images.shape[:3], 3)
        features = {"image": torch.cat([self.encoder.images(part) for part in rgb.split(BATCH)])}
        if texts is not None:
            features["text"] = self.encoder.texts(texts)
        return features

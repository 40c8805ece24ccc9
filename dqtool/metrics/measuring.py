"""Measurement of a set of images by metrics of the registry, in one pass that runs each network once on every image."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts.jsonvalues import Json
from dqtool.distributed import by_rows, shared_batches
from dqtool.metrics.reference import Reference
from dqtool.metrics.registry import EXTRACTORS, METRICS, Accumulator, Extractor, Files, check_needs

__all__ = ["Batch", "Meter"]

Batch = tuple[Tensor, "list[str] | None"]
"""Images uint8 `[n, H, W, C]` and their prompts, or None."""


class Meter:
    """Metrics ready to measure any number of image sets: networks are loaded and the reference is read once.

    Errors of reading the files are passed on.

    Raises:
        EnvironmentFault: a file that a metric needs was not given.
    """

    def __init__(self, names: Sequence[str], files: Files) -> None:
        check_needs(names, files)
        self.names = tuple(names)
        self.files = files
        networks = dict.fromkeys(kind for name in self.names if (kind := METRICS[name].extractor) is not None)
        self.extractors: dict[str, Extractor] = {
            kind: EXTRACTORS[kind].open(getattr(files, EXTRACTORS[kind].needs)) for kind in networks
        }
        self.measures_reference = False
        self.reference_model: dict[str, tuple[Tensor, Tensor]] = {}
        for name in self.names:  # report an unusable file now, not after hours of sampling
            self._start(name)

    @cached_property
    def reference(self) -> Reference:
        """Reference statistics from the user's file."""
        assert self.files.ref_stats is not None
        inception: Any = self.extractors["inception"]
        return Reference(self.files.ref_stats, inception, inception.weights_sha256)

    def measure(
        self,
        batches: Iterable[Batch],
        total: int | None = None,
        what: str = "eval: metrics",
        *,
        of_reference: bool = False,
    ) -> dict[str, Json]:
        """Return the figures of a set of images, and in `extractors` the network and file that each figure is based on.

        With `of_reference` the images are those of the reference model, and image sets measured later are compared with
        them.
        """
        self.measures_reference = of_reference
        running: dict[str, Accumulator] = {name: self._start(name) for name in self.names}
        count = 0
        with report.progress(what, total, "image") as progress:
            for images, texts in shared_batches(batches):
                rgb = images.expand(*images.shape[:3], 3)
                for kind, extractor in self.extractors.items():
                    features = _shared_features(extractor, rgb, texts)
                    for name, accumulator in running.items():
                        if METRICS[name].extractor == kind:
                            accumulator.update(features)
                count += len(images)
                progress.advance(len(images))
        figures: dict[str, Json] = {}
        for name, accumulator in running.items():
            figures |= accumulator.finish()
            least = METRICS[name].minimum_samples
            if count < least:
                report.warn(
                    f"{name} of {count} images is biased; compare it at equal numbers only, or use {least} or more"
                )
        figures["extractors"] = {
            figure.key: self.extractors[network].describe()
            for name in self.names
            for figure in METRICS[name].figures
            if figure.key in figures and (network := METRICS[name].extractor) is not None
        }
        return figures

    def _start(self, name: str) -> Accumulator:
        """Return a new accumulator of a metric."""
        start = METRICS[name].start
        assert start is not None, f"{name} reads no features"
        return start(self)


def _shared_features(extractor: Extractor, images: Tensor, texts: list[str] | None) -> Mapping[str, Tensor]:
    """Return the features of `images` `[n, H, W, 3]`. Processes that share a command take a part of them each."""

    def features(part: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return dict(extractor(part, None if texts is None else [texts[row] for row in rows.tolist()]))

    return by_rows(features, images, torch.arange(len(images)), rows=len(images))

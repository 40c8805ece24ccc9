"""Reference statistics: the real images that Fréchet distances, precision and recall compare with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dqtool import report
from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.artifacts.npz import npz_arrays, npz_names
from dqtool.artifacts.reading import parse_json
from dqtool.errors import ArtifactError
from dqtool.metrics.batches import IMAGES, NpzImages, write_npz
from dqtool.metrics.frechet import RunningStatistics
from dqtool.metrics.inception import POOL, SPATIAL
from dqtool.metrics.manifold import Manifold

__all__ = ["Reference", "save_statistics"]

STATISTICS = {"pool_3": ("mu", "sigma", POOL), "mixed_6": ("mu_s", "sigma_s", SPATIAL)}
"""Names of mean and covariance in an npz file, and the number of features, of each Inception output."""
BATCH = 32
"""Images that run through the network together."""
_NOTE = 1 << 20
"""Largest note that is read, in bytes."""

Extract = Callable[[Tensor], Mapping[str, Tensor]]
"""Function that returns Inception outputs by name, of images uint8 `[n, H, W, C]`."""


class ImageSource(Protocol):
    """Images that can be read in batches, repeatedly."""

    def __len__(self) -> int: ...

    def read(self, batch_size: int) -> Iterator[Tensor]: ...


class Reference:
    """Npz file in the ADM suite's layout, with statistics, images or both.

    Statistics missing from the file are computed from its images, as the suite does. `extract` is the Inception
    network; a warning is shown if the file was made with other weights.
    """

    def __init__(self, path: str | os.PathLike[str], extract: Extract, weights_sha256: str | None = None) -> None:
        self.given = os.fspath(path)
        self._extract = extract
        self._names = npz_names(path)
        made_by = self.about.get("inception_sha256")
        if made_by and weights_sha256 and made_by != weights_sha256:
            report.warn(f"{self.given} was made with other Inception weights than --inception-weights")

    @cached_property
    def about(self) -> dict[str, Json]:
        """Note that `dqtool stats` stored in the file; empty for files from other tools."""
        if "dqtool" not in self._names:
            return {}
        try:
            return dict(parse_json(str(npz_arrays(self.given, ["dqtool"], _NOTE)["dqtool"])))
        except (ValueError, TypeError) as error:
            raise ArtifactError("The dqtool note in this file is damaged", where=self.given) from error

    @property
    def has_images(self) -> bool:
        """True if the file holds images, which precision and recall need."""
        return IMAGES in self._names

    def statistics(self, output: str) -> tuple[Tensor, Tensor]:
        """Return mean `[D]` and covariance `[D, D]`, float64, of the output `pool_3` or `mixed_6`.

        Raises:
            ArtifactError: the file lacks them, or their shapes or types are wrong.
        """
        mean_name, cov_name, features = STATISTICS[output]
        if mean_name not in self._names and self.has_images and "mu" not in self._names:
            return self._from_images[0][output]
        arrays = npz_arrays(self.given, [mean_name, cov_name])
        mean, cov = arrays[mean_name], arrays[cov_name]
        numbers = all(x.dtype.kind == "f" for x in (mean, cov))
        if not numbers or mean.shape != (features,) or cov.shape != (features, features):
            raise ArtifactError(
                f"{mean_name} and {cov_name} should be [{features}] and [{features}, {features}], and are "
                f"{list(mean.shape)} and {list(cov.shape)}",
                where=self.given,
            )
        return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(cov.astype(np.float64))

    def check_images(self) -> None:
        """Check that the file holds images, which precision and recall need.

        Raises:
            ArtifactError: the file holds statistics only, or damaged images.
        """
        if not self.has_images:
            raise ArtifactError(
                "Precision and recall need reference images, and this file holds statistics only",
                where=self.given,
                fix="Make a file with images with `dqtool stats DIR`, or leave pr out of --metrics",
            )
        NpzImages(self.given)

    @cached_property
    def manifold(self) -> Manifold:
        """Manifold of the images' `pool_3` features, with the suite's distances; see `check_images`."""
        self.check_images()
        return Manifold.of(self._from_images[1], half=True)

    @cached_property
    def _from_images(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Return the statistics of each output and the features `pool_3` `[N, 2048]` of the file's images."""
        images = NpzImages(self.given)
        running = {output: RunningStatistics() for output in STATISTICS}
        pool = []
        with report.progress("eval: reference images", len(images), "image") as progress:
            for batch in images.read(BATCH):
                outputs = self._extract(batch)
                for output, statistics in running.items():
                    statistics.update(outputs[output])
                pool.append(outputs["pool_3"])
                progress.advance(len(batch))
        return {output: statistics.finish() for output, statistics in running.items()}, torch.cat(pool)


def save_statistics(
    source: ImageSource, path: str | os.PathLike[str], extract: Extract, keep: int, about: JsonObject
) -> None:
    """Write reference statistics of all images of `source`, and `keep` evenly spread images as `arr_0`.

    Errors of reading the images are passed on.

    Raises:
        EnvironmentFault: the file can't be written.
    """
    running = {output: RunningStatistics() for output in STATISTICS}
    with report.progress("stats: images", len(source), "image") as progress:
        for batch in source.read(BATCH):
            outputs = extract(batch)
            for output, statistics in running.items():
                statistics.update(outputs[output])
            progress.advance(len(batch))
    arrays: dict[str, np.ndarray] = {}
    for output, (mean_name, cov_name, _) in STATISTICS.items():
        mean, cov = running[output].finish()
        arrays |= {mean_name: mean.numpy(), cov_name: cov.numpy()}
    kept = min(keep, len(source))
    images = (kept, _chosen(source, kept)) if kept else None
    write_npz(path, images, arrays, {**about, "images": len(source), "images_kept": kept})


def _chosen(source: ImageSource, count: int) -> Iterable[Tensor]:
    """Yield `count` images in batches, evenly spread over the source."""
    chosen = torch.zeros(len(source), dtype=torch.bool)
    chosen[torch.arange(count) * len(source) // count] = True
    start = 0
    for batch in source.read(BATCH):
        mask = chosen[start : start + len(batch)]
        start += len(batch)
        if mask.any():
            yield batch[mask]

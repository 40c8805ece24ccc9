"""Registry of the metrics on images: the network that reads the images, the files the user must give, the figures.

Imports no torch. A new metric is one entry of `METRICS`; a new network that reads images is one entry of `EXTRACTORS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dqtool.artifacts.files import digest_of_files, sha256_file
from dqtool.artifacts.jsonvalues import Json
from dqtool.errors import EnvironmentFault
from dqtool.metrics.figures import Figure

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.metrics.reference import Reference

__all__ = [
    "CLASSIFIERS",
    "EXTRACTORS",
    "FIGURES",
    "METRICS",
    "Accumulator",
    "ExtractorEntry",
    "Files",
    "Measurement",
    "Metric",
    "available",
    "check_needs",
    "option_flag",
    "path_digest",
]


@dataclass(frozen=True)
class Files:
    """Paths that the user gave for the metrics. Each field is a long option of `dqtool eval`."""

    inception_weights: str | None = None
    clip: str | None = None
    aesthetic_weights: str | None = None
    ref_stats: str | None = None

    def given(self) -> dict[str, str]:
        """Return the paths that were given, by field."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def describe(self) -> dict[str, dict[str, str]]:
        """Return name and SHA-256 of each given file, by field, as reports and fingerprints store them.

        Raises:
            EnvironmentFault: a file is missing.
        """
        return {
            field: {"file": os.path.basename(os.path.normpath(path)), "sha256": path_digest(path)}
            for field, path in self.given().items()
        }


class Extractor(Protocol):
    """Network that reads images."""

    def describe(self) -> dict[str, Json]:
        """Return the network's entry in reports: `name`, `file` and `sha256`."""

    def __call__(self, images: Tensor, texts: list[str] | None) -> Mapping[str, Tensor]:
        """Return features `[n, D]` by name, of `images` uint8 `[n, H, W, 3]` and their prompts."""


class Accumulator(Protocol):
    """Running computation of one metric: takes features batch by batch and returns the figures at the end."""

    def update(self, features: Mapping[str, Tensor]) -> None: ...

    def finish(self) -> dict[str, float]: ...


class Measurement(Protocol):
    """Measurement that an accumulator belongs to: the user's files, the networks and the reference."""

    files: Files
    extractors: dict[str, Extractor]
    measures_reference: bool
    """True while the reference model's images are measured."""
    reference_model: dict[str, tuple[Tensor, Tensor]]
    """Mean and covariance of each feature over the reference model's images."""

    @property
    def reference(self) -> Reference:
        """Reference statistics read from the user's file."""


@dataclass(frozen=True)
class ExtractorEntry:
    """Entry of `EXTRACTORS`: the field of `Files` with the network's file, and the function that loads it."""

    needs: str
    open: Callable[[str], Extractor]


@dataclass(frozen=True)
class Metric:
    """Entry of `METRICS`. A metric has either `start` or `compare`.

    Attributes:
        figures: figures that the metric reports.
        extractor: name in `EXTRACTORS` of the network whose features `start` reads.
        start: function that returns an accumulator of features.
        compare: function (images, reference images of the same noise or None, digit asked for each image or None) that
            returns the figures.
        distance: function of two sets of images that returns their `fd.NAME_from_reference`, for `--floor`.
        needs: fields of `Files` in addition to the extractor's own.
        least_samples: with fewer images the metric reports nothing.
        minimum_samples: with fewer images the figure is biased, and a warning is shown.
        needs_prompts: the metric reports nothing for images without prompts.
        version: raised when figures change, so that older reports are computed again.
        added: raised when the metric gets another figure and the rest stays, so that reports without it are computed
            again. Unlike `version` it is not part of the name of a table's finished cells.
        embedded: beginning of the names of the embedded models whose images the metric reads; it is measured by default there.
    """

    figures: tuple[Figure, ...]
    extractor: str | None = None
    start: Callable[[Measurement], Accumulator] | None = None
    compare: Callable[[Tensor, Tensor | None, Tensor | None], dict[str, Json]] | None = None
    needs: tuple[str, ...] = ()
    least_samples: int = 0
    minimum_samples: int = 0
    needs_prompts: bool = False
    version: int = 1
    added: int = 0
    distance: Callable[[Tensor, Tensor], float] | None = None
    embedded: str | None = None

    def reads(self, source: str) -> bool:
        """Return whether the metric reads images of the embedded model with this name."""
        return self.embedded is not None and source.startswith(self.embedded)

    @property
    def files(self) -> tuple[str, ...]:
        """Fields of `Files` that the metric needs."""
        return (*(() if self.extractor is None else (EXTRACTORS[self.extractor].needs,)), *self.needs)


def path_digest(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file, or of the names and digests of a directory's files, hidden ones excluded."""
    root = Path(path)
    if root.is_file():
        found = root.stat()
        return _file_digest(str(root.absolute()), found.st_mtime_ns, found.st_size)
    if not root.is_dir():
        return sha256_file(path)  # raises the error that fits
    inside = [(file.relative_to(root), file) for file in sorted(root.rglob("*")) if file.is_file()]
    return digest_of_files(
        (name.as_posix(), file) for name, file in inside if not any(part.startswith(".") for part in name.parts)
    )


@lru_cache(maxsize=64)
def _file_digest(path: str, _modified: int, _size: int) -> str:
    """Return the SHA-256 of a file, cached: reference files have gigabytes and are hashed several times a run."""
    return sha256_file(path)


def option_flag(field: str) -> str:
    """Return the long option that sets a field of `Files`."""
    return f"--{field.replace('_', '-')}"


def available(files: Files, *, prompts: bool) -> tuple[str, ...]:
    """Return the metrics that these files suffice for; those that need prompts only with `prompts`."""
    given = files.given()
    return tuple(
        name
        for name, metric in METRICS.items()
        if metric.files and set(metric.files) <= set(given) and (prompts or not metric.needs_prompts)
    )


def check_needs(names: Iterable[str], files: Files) -> None:
    """Check that every file that the metrics need was given.

    Raises:
        EnvironmentFault: a file is missing.
    """
    for name in names:
        for field in METRICS[name].files:
            if field not in files.given():
                raise EnvironmentFault(
                    f"The metric '{name}' needs {_WHAT[field]}, and dqtool downloads nothing",
                    where=option_flag(field),
                    fix=f"Give {option_flag(field)} {'DIR' if field == 'clip' else 'FILE'}, or leave {name} out of --metrics",
                )


_WHAT = {
    "inception_weights": "the weights of FID's Inception network",
    "clip": "a CLIP model",
    "aesthetic_weights": "the weights of an aesthetic predictor",
    "ref_stats": "reference statistics (`dqtool stats DIR` makes them)",
}
"""Description of each file in error messages."""


def _later(module: str, name: str) -> Callable[..., Any]:
    """Return a function that imports `dqtool.metrics.MODULE.NAME`, and thereby torch, when it is called."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"dqtool.metrics.{module}"), name)(*arguments)

    return call


EXTRACTORS = {
    "inception": ExtractorEntry("inception_weights", _later("extractors", "InceptionExtractor")),
    "clip": ExtractorEntry("clip", _later("extractors", "ClipExtractor")),
}


def _of_classifier(name: str, one: str, embedded: str) -> Metric:
    """Return the metric of `metrics/NAME.py`'s classifier, whose classes are called `one`."""
    figures = (
        Figure(f"fd.{name}", f"fd.{name}", -1),
        Figure(f"fd.{name}_ratio", "of full precision", -1, compares=True),
        Figure(f"fd.{name}_from_reference", f"fd.{name} to full precision", -1, 3, compares=True),
        Figure(f"is.{name}", f"is.{name}", 1),
        Figure(f"is.{name}.std", f"is.{name}, deviation of the splits"),
        Figure("confident_share", "confident, %", 1, 1, 100, column="confident"),
        Figure(f"same_{one}_share", f"same {one}, %", 1, 1, 100, column=f"same_{one}", compares=True),
        Figure(f"asked_{one}_share", f"{one} asked for, %", 1, 1, 100, column=f"asked_{one}"),
    )
    return Metric(
        figures,
        compare=_later(name, "compare"),
        distance=_later(name, "distance"),
        least_samples=10,
        added=1,
        embedded=embedded,
    )


_POOL, _SPATIAL = 20480, 20230  # frechet.minimum_samples of 2048 and of 2023 features; without torch here
METRICS = {
    "digits": _of_classifier("digits", "digit", "zoo:digits-"),
    "garments": _of_classifier("garments", "garment", "zoo:fashion"),
    "similarity": Metric(
        (
            Figure("psnr", "PSNR, dB", 1, compares=True),
            Figure("ssim", "SSIM", 1, 4, compares=True),
            Figure("detail_power", "detail, of full precision", 0, 3, compares=True),
        ),
        compare=_later("similarity", "compare_images"),
    ),
    "fid": Metric(
        (Figure("fid", "FID", -1),), "inception", _later("accumulators", "Fid"), None, ("ref_stats",), 2, _POOL
    ),
    "fid-reference": Metric(
        (Figure("fid_from_reference", "FID to full precision", -1),),
        "inception",
        _later("accumulators", "FidFromReference"),
        least_samples=2,
        minimum_samples=_POOL,
    ),
    "sfid": Metric(
        (Figure("sfid", "sFID", -1),),
        "inception",
        _later("accumulators", "SpatialFid"),
        None,
        ("ref_stats",),
        2,
        _SPATIAL,
    ),
    "is": Metric(
        (Figure("is", "IS", 1), Figure("is.std", "IS, deviation of the splits")),
        "inception",
        _later("accumulators", "InceptionScore"),
        minimum_samples=5000,
    ),
    "pr": Metric(
        (Figure("precision", "precision", 1, 3), Figure("recall", "recall", 1, 3)),
        "inception",
        _later("accumulators", "PrecisionRecall"),
        needs=("ref_stats",),
        least_samples=4,
        version=2,
    ),
    "clip": Metric((Figure("clip", "CLIP score", 1),), "clip", _later("accumulators", "ClipScore"), needs_prompts=True),
    "aesthetic": Metric(
        (Figure("aesthetic", "aesthetic score", 1),),
        "clip",
        _later("accumulators", "AestheticScore"),
        needs=("aesthetic_weights",),
    ),
}

CLASSIFIERS = tuple(name for name, metric in METRICS.items() if metric.embedded is not None)
"""Metrics that read images by a classifier of their own."""

FIGURES = {figure.key: figure for metric in METRICS.values() for figure in metric.figures}
"""Every figure of a metric by key, in the order of pages and tables."""

"""The metrics on images by name: which network reads the images, which files the user has to give, what is reported.

Light to import. A new metric is one entry of `METRICS`, a new network that reads images one of `EXTRACTORS`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dqtool.artifacts.files import sha256_file
from dqtool.errors import EnvironmentFault

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.metrics.reference import Reference

__all__ = [
    "EXTRACTORS",
    "METRICS",
    "Accumulator",
    "Files",
    "Kind",
    "Measurement",
    "Metric",
    "available",
    "check_needs",
    "option",
    "path_digest",
]


@dataclass(frozen=True)
class Files:
    """What the user gave for the metrics: paths, as given. Field by field the long options of `dqtool eval`."""

    inception_weights: str | None = None
    clip: str | None = None
    aesthetic_weights: str | None = None
    ref_stats: str | None = None

    def given(self) -> dict[str, str]:
        """Those that are there, by field."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    def describe(self) -> dict[str, dict[str, str]]:
        """Those that are there as reports and fingerprints keep them: field to `file` (its name) and `sha256`.

        Raises `EnvironmentFault` for one that is missing.
        """
        return {
            field: {"file": os.path.basename(os.path.normpath(path)), "sha256": path_digest(path)}
            for field, path in self.given().items()
        }


class Extractor(Protocol):
    """A network that reads images."""

    def describe(self) -> dict[str, Any]:
        """How reports name it: `name`, `file`, `sha256`."""

    def __call__(self, images: Tensor, texts: list[str] | None) -> Mapping[str, Tensor]:
        """Features `[n, D]` by name, of `images` uint8 `[n, H, W, 3]` and their prompts."""


class Accumulator(Protocol):
    """A metric at work: takes features in batch by batch, then gives its figures."""

    def update(self, features: Mapping[str, Tensor]) -> None: ...

    def finish(self) -> dict[str, float]: ...


class Measurement(Protocol):
    """The measurement that an accumulator belongs to: the user's files, the networks, and what images are compared with."""

    files: Files
    extractors: dict[str, Extractor]
    measures_reference: bool
    """The images at hand are the reference model's, which later ones are compared with."""
    reference_model: dict[str, tuple[Tensor, Tensor]]
    """Mean and covariance, by feature, of the reference model's images."""

    @property
    def reference(self) -> Reference:
        """Reference statistics read from the user's file."""


@dataclass(frozen=True)
class Kind:
    """An entry of `EXTRACTORS`: the file it is read from, and how."""

    needs: str
    open: Callable[[str], Extractor]


@dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`.

    `needs` are fields of `Files` beside the extractor's own. `minimum_samples`: below it the figure is biased and a
    warning says so. `needs_prompts`: images without prompts have no such figure.
    """

    figures: tuple[str, ...]
    extractor: str
    start: Callable[[Measurement], Accumulator]
    needs: tuple[str, ...] = ()
    minimum_samples: int = 0
    needs_prompts: bool = False


def path_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, or of a directory: of the names and digests of its files, hidden ones left out."""
    root = Path(path)
    if root.is_file():
        found = root.stat()
        return _file_digest(str(root.absolute()), found.st_mtime_ns, found.st_size)
    if not root.is_dir():
        return sha256_file(path)  # says what is the matter
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        inside = file.relative_to(root)
        if file.is_file() and not any(part.startswith(".") for part in inside.parts):
            digest.update(f"{inside.as_posix()}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _file_digest(path: str, _modified: int, _size: int) -> str:
    """Reference batches are gigabytes, and the digest is asked for several times a run."""
    return sha256_file(path)


def option(field: str) -> str:
    """The long option that sets a field of `Files`."""
    return f"--{field.replace('_', '-')}"


def available(files: Files, *, prompts: bool) -> tuple[str, ...]:
    """The metrics that these files are enough for; those of prompts only if there are any."""
    given = files.given()
    return tuple(
        name
        for name, metric in METRICS.items()
        if set(_needs(metric)) <= set(given) and (prompts or not metric.needs_prompts)
    )


def check_needs(names: Iterable[str], files: Files) -> None:
    """Raise `EnvironmentFault` for a metric of which a file was not given."""
    for name in names:
        for field in _needs(METRICS[name]):
            if field not in files.given():
                raise EnvironmentFault(
                    f"The metric '{name}' needs {_WHAT[field]}, and dqtool downloads nothing",
                    where=option(field),
                    fix=f"Give {option(field)} {'DIR' if field == 'clip' else 'FILE'}, or leave {name} out of --metrics",
                )


def _needs(metric: Metric) -> tuple[str, ...]:
    return (EXTRACTORS[metric.extractor].needs, *metric.needs)


_WHAT = {
    "inception_weights": "the weights of FID's Inception network",
    "clip": "a CLIP model",
    "aesthetic_weights": "the weights of an aesthetic predictor",
    "ref_stats": "reference statistics (`dqtool stats DIR` makes them)",
}


def _later(module: str, name: str) -> Callable[..., Any]:
    """`dqtool.metrics.MODULE.NAME`, imported when it is called: it brings torch."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"dqtool.metrics.{module}"), name)(*arguments)

    return call


EXTRACTORS = {
    "inception": Kind("inception_weights", _later("extractors", "InceptionExtractor")),
    "clip": Kind("clip", _later("extractors", "ClipExtractor")),
}

_POOL, _SPATIAL = 20480, 20230  # frechet.minimum_samples of 2048 and of 2023 features; without torch here
METRICS = {
    "fid": Metric(("fid",), "inception", _later("accumulators", "Fid"), ("ref_stats",), _POOL),
    "fid-reference": Metric(
        ("fid_from_reference",), "inception", _later("accumulators", "FidFromReference"), minimum_samples=_POOL
    ),
    "sfid": Metric(("sfid",), "inception", _later("accumulators", "SpatialFid"), ("ref_stats",), _SPATIAL),
    "is": Metric(("is", "is.std"), "inception", _later("accumulators", "InceptionScore"), minimum_samples=5000),
    "pr": Metric(("precision", "recall"), "inception", _later("accumulators", "PrecisionRecall"), ("ref_stats",)),
    "clip": Metric(("clip",), "clip", _later("accumulators", "ClipScore"), needs_prompts=True),
    "aesthetic": Metric(("aesthetic",), "clip", _later("accumulators", "AestheticScore"), ("aesthetic_weights",)),
}

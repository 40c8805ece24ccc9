"""Use of the metrics registry by `dqtool eval`: choose metrics, feed them images, save samples as npz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from dqtool.artifacts.jsonvalues import Json
from dqtool.errors import UsageError
from dqtool.metrics import METRICS, Files, available
from dqtool.metrics.registry import check_needs, option_flag

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.metrics.measuring import Batch, Meter

__all__ = ["choose_metrics", "computable_metrics", "files_of", "metric_figures", "prepared_meter", "save_samples"]

BATCH = 64


class _Options(Protocol):
    """The options of `eval` that are read here."""

    @property
    def inception_weights(self) -> str | None: ...
    @property
    def clip(self) -> str | None: ...
    @property
    def aesthetic_weights(self) -> str | None: ...
    @property
    def ref_stats(self) -> str | None: ...


def files_of(options: _Options) -> Files:
    """Return the files that were given for metrics."""
    return Files(options.inception_weights, options.clip, options.aesthetic_weights, options.ref_stats)


def computable_metrics(files: Files, *, prompts: bool) -> tuple[str, ...]:
    """Return the metrics that can be computed from the given files and the contents of the reference statistics."""
    chosen = available(files, prompts=prompts)
    if files.ref_stats is not None and "fid" in chosen and not _has(files.ref_stats, "arr_0"):
        chosen = tuple(name for name in chosen if name != "pr")
    if files.ref_stats is not None and "sfid" in chosen and not _has(files.ref_stats, "mu_s", "arr_0"):
        chosen = tuple(name for name in chosen if name != "sfid")
    return chosen


def choose_metrics(asked: Sequence[str] | None, files: Files, *, prompts: bool) -> tuple[str, ...]:
    """Return the registry's metrics among those `asked` for; None stands for all that the files suffice for.

    Raises:
        EnvironmentFault: a metric whose file was not given, or a file that is of no use without another.
        UsageError: a metric of prompts for a model that takes none.
    """
    if asked is not None:
        chosen = tuple(name for name in asked if name in METRICS and METRICS[name].start is not None)
        check_needs(chosen, files)
    else:
        chosen = computable_metrics(files, prompts=prompts)
        for field in files.given():
            users = [name for name, metric in METRICS.items() if field in metric.files]
            if not set(users) & set(chosen):
                _explain(field, users, files)
    for name in chosen:
        if METRICS[name].needs_prompts and not prompts:
            raise UsageError(
                f"The metric '{name}' compares images with prompts, and this model takes none", where="--metrics"
            )
    return chosen


def _explain(field: str, users: Sequence[str], files: Files) -> None:
    """Raise for a file that none of its `users` can make anything of: another is missing, or the model takes no prompts."""
    if any(METRICS[name].needs_prompts and set(available(files, prompts=True)) & {name} for name in users):
        raise UsageError(
            "The CLIP score compares images with prompts, and this model takes none",
            where=option_flag(field),
            fix="Leave it out, or give --aesthetic-weights too for the aesthetic score",
        )
    check_needs(users[:1], files)


def _has(path: str, *names: str) -> bool:
    from dqtool.artifacts.npz import npz_names

    return bool(set(names) & set(npz_names(path)))


def prepared_meter(names: Sequence[str], files: Files) -> Meter | None:
    """Load the metrics' networks and check their files; return a meter, or None without metrics."""
    from dqtool.metrics.measuring import Meter

    return Meter(names, files) if names else None


def metric_figures(
    meter: Meter,
    images: Tensor,
    texts: Sequence[str] | None,
    image_size: int | None,
    what: str,
    *,
    of_reference: bool = False,
) -> dict[str, Json]:
    """Return the figures of `images [N, C, H, W]` in [-1, 1] and their prompts; with `image_size`, of the images' centres.

    Measure the images `of_reference` first: the others are compared with them.
    """
    return meter.measure(_batches(images, texts, image_size), len(images), what, of_reference=of_reference)


def save_samples(path: str, images: Tensor, image_size: int | None, about: dict[str, Json]) -> None:
    """Write `images [N, C, H, W]` in [-1, 1] as a sample batch of the ADM suite."""
    from dqtool.metrics.batches import write_npz

    write_npz(path, (len(images), (batch for batch, _ in _batches(images, None, image_size))), {}, about)


def _batches(images: Tensor, texts: Sequence[str] | None, image_size: int | None) -> Iterator[Batch]:
    from dqtool.metrics.grid import to_uint8
    from dqtool.metrics.resize import center_crops

    for start in range(0, len(images), BATCH):
        batch = to_uint8(images[start : start + BATCH])
        if image_size is not None:
            batch = center_crops(batch, image_size)
        yield batch, None if texts is None else list(texts[start : start + BATCH])

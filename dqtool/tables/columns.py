"""Columns that a table can have: the figure of a cell that each shows, and its format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dqtool.metrics import CLASSIFIERS, FIGURES, Figure, value_of

__all__ = ["COLUMNS", "Column"]

Metrics = Mapping[str, Any]
"""Figures of a cell by stage (`dilate`, `calibrate`, `distill`, `eval`), and `errors`, which the runner measures."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        label: heading.
        value: called as `value(metrics)`, returns the figure, or None if the cell has none.
        better: -1 if lower is better, 1 if higher is, else 0.
        decimals: decimals to show.
        of_reference: like `value`, for the full-precision model.
        relative: called as `relative(metrics, baseline_metrics)` in place of `value`, for a figure that compares a cell with
            the table's baseline row.
        above: `relative` compares with the row above instead.
    """

    label: str
    value: Callable[[Metrics], float | None]
    better: int = 0
    decimals: int = 2
    of_reference: Callable[[Metrics], float | None] = lambda _metrics: None
    relative: Callable[[Metrics, Metrics], float | None] | None = None
    above: bool = False


def _at(stage: str, *keys: str, scale: float = 1.0) -> Callable[[Metrics], float | None]:
    def value(metrics: Metrics) -> float | None:
        found: Any = metrics.get(stage)
        for key in keys:
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) * scale if isinstance(found, int | float) else None

    return value


def _scaling(key: str, scale: float = 1.0) -> Callable[[Metrics], float | None]:
    """Return the reader of a figure of the final factors: those of `calibrate` if it was run, else of `dilate`."""

    def value(metrics: Metrics) -> float | None:
        final = _at("calibrate", key, scale=scale)(metrics)
        return _at("dilate", key, scale=scale)(metrics) if final is None else final

    return value


def _of_figure(figure: Figure) -> Column:
    """Return the column of a figure that a metric reports."""

    def value(metrics: Metrics) -> float | None:
        found = value_of(metrics.get("eval") or {}, figure.key)
        return None if found is None else found * figure.scale

    def of_reference(metrics: Metrics) -> float | None:
        found = value_of((metrics.get("eval") or {}).get("reference") or {}, figure.key)
        return None if found is None else found * figure.scale

    return Column(figure.label, value, figure.better, figure.decimals, of_reference)


def _distance(metrics: Metrics, stage: str = "eval") -> float | None:
    """Return the distance to the training images by the model's own classifier, among a stage's figures."""
    found = (_at(stage, f"fd.{name}")(metrics) for name in CLASSIFIERS)
    return next((value for value in found if value is not None), None)


def _excess(metrics: Metrics, baseline: Metrics) -> float | None:
    """Return the distance that a cell adds to full precision's, in percent of the distance that the baseline adds.

    Return None if the baseline adds nothing.
    """
    mine, base, full = _distance(metrics), _distance(baseline), _distance((metrics.get("eval") or {}), "reference")
    if mine is None or full is None or base is None or base <= full:
        return None
    return 100 * (mine - full) / (base - full)


def _gain(metrics: Metrics, above: Metrics) -> float | None:
    """Return the PSNR that a cell adds to that of the row above, in dB."""
    mine, base = (_at("eval", "psnr", "mean")(each) for each in (metrics, above))
    return None if mine is None or base is None else mine - base


def _processor_seconds(metrics: Metrics) -> float | None:
    """Return the processor seconds of training, without the fit of a correction that is switched off in the cell."""
    whole, fit = _at("distill", "training_cpu_seconds")(metrics), _at("distill", "correction_cpu_seconds")(metrics)
    off = (metrics.get("eval") or {}).get("correction") == "off"
    return whole if whole is None or fit is None or not off else whole - fit


def _sum_seconds(metrics: Metrics) -> float | None:
    parts = [_at(stage, "seconds")(metrics) for stage in ("dilate", "calibrate", "distill")]
    return None if parts[-1] is None else sum(part or 0.0 for part in parts)


def _training_memory(metrics: Metrics) -> float | None:
    """Return the peak memory of training in MB: of the GPU if there was one, else main memory."""
    on_device = _at("distill", "peak_device_bytes", scale=1e-6)(metrics)
    return _at("distill", "peak_memory_bytes", scale=1e-6)(metrics) if on_device is None else on_device


def _curve_end(index: int) -> Callable[[Metrics], float | None]:
    def value(metrics: Metrics) -> float | None:
        curve = (metrics.get("distill") or {}).get("loss_curve") or []
        few = max(1, len(curve) // 10)
        part = curve[:few] if index == 0 else curve[-few:]
        return sum(part) / len(part) if part else None

    return value


COLUMNS: dict[str, Column] = {
    **{figure.column_name: _of_figure(figure) for figure in FIGURES.values()},
    "excess": Column("excess left, %", lambda _metrics: None, -1, 1, relative=_excess),
    "psnr_gain": Column("PSNR over the row above, dB", lambda _metrics: None, 0, 2, relative=_gain, above=True),
    "size": Column(
        "size, MB",
        _at("eval", "cost", "bytes", scale=1e-6),
        -1,
        3,
        of_reference=_at("eval", "cost", "bytes_float32", scale=1e-6),
    ),
    "size_ratio": Column("smaller", _at("eval", "cost", "size_ratio"), 1, 1),
    "bops_ratio": Column("fewer BOPs", _at("eval", "cost", "bops_ratio"), 1, 1),
    "train_seconds": Column("training, s", _at("distill", "training_seconds"), -1, 0),
    "quantize_seconds": Column("dilate to distill, s", _sum_seconds, -1, 0),
    "train_cpu": Column("processor, s", _processor_seconds, -1, 0),
    "train_memory": Column("training memory, MB", _training_memory, -1, 0),
    "train_allocated": Column("without mapped files, MB", _at("distill", "peak_anonymous_bytes", scale=1e-6), -1, 0),
    "unsaturated": Column("scaled in-channels, %", _scaling("unsaturated_share", scale=100), 0, 1),
    "mean_dilation": Column("mean s", _scaling("mean_dilation"), 0, 3),
    "range_ratio": Column("Δx'/Δx", _at("calibrate", "activation_range_ratio"), -1, 3),
    "weight_scale_ratio": Column("Δw'/Δw", _at("errors", "weight_scale_ratio"), 0, 3),
    "weight_clipping": Column("weights: clipped, %", _at("errors", "weight_clipping", scale=100), 0, 1),
    "weight_rounding": Column("rounded, %", _at("errors", "weight_rounding", scale=100), 0, 1),
    "weight_error": Column("weight error", _at("errors", "weight_error"), -1, 5),
    "activation_clipping": Column("activations: clipped, %", _at("errors", "activation_clipping", scale=100), 0, 1),
    "activation_rounding": Column("rounded, %", _at("errors", "activation_rounding", scale=100), 0, 1),
    "activation_error": Column("activation error", _at("errors", "activation_error"), -1, 5),
    "error_bound": Column("bound of a layer's error", _at("errors", "bound"), -1, 3),
    "output_error": Column("measured", _at("errors", "output"), -1, 3),
    "first_loss": Column("first loss", _curve_end(0), -1, 5),
    "last_loss": Column("last loss", _curve_end(1), -1, 5),
}
"""Columns by the name that tables use."""

"""Metrics on images and tensors, one file each. `METRICS` holds those of `dqtool eval`, `FIGURES` the figures they
report."""

from __future__ import annotations

from dqtool.metrics.figures import Figure, value_of
from dqtool.metrics.registry import CLASSIFIERS, FIGURES, METRICS, Files, Metric, available

__all__ = ["CLASSIFIERS", "FIGURES", "METRICS", "Figure", "Files", "Metric", "available", "value_of"]

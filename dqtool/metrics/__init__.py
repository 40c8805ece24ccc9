"""Measures of images and tensors, one per file. `METRICS` lists those that `dqtool eval` knows, `FIGURES` what they report."""

from __future__ import annotations

from dqtool.metrics.figures import Figure, value_of
from dqtool.metrics.registry import FIGURES, METRICS, Files, Metric, available

__all__ = ["FIGURES", "METRICS", "Figure", "Files", "Metric", "available", "value_of"]

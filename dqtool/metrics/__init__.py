"""What is measured on images and tensors, one measure per file; `METRICS` has those that `dqtool eval` knows by name."""

from __future__ import annotations

from dqtool.metrics.registry import METRICS, Files, Metric, available

__all__ = ["METRICS", "Files", "Metric", "available"]

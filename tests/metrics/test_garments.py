"""The garment classifier and its figures. Numbers of real images need Debian's package dataset-fashion-mnist."""

from __future__ import annotations

import pytest
import torch

from dqtool.metrics import METRICS
from dqtool.metrics.garments import GARMENTS
from dqtool.zoo.data import FASHION, fashion


def test_the_classifier_is_packaged_and_named_in_reports() -> None:
    figures = METRICS["garments"].compare(torch.rand(100, 1, 32, 32) * 2 - 1, None, torch.arange(100) % 10)  # type: ignore[misc]
    assert set(figures) <= {figure.key for figure in METRICS["garments"].figures} | {"samples", "extractor"}
    assert figures["extractor"] == GARMENTS.describe()
    assert figures["fd.garments"] > 50  # noise is no garment


def test_only_the_embedded_garments_are_measured_by_default() -> None:
    assert METRICS["garments"].reads("zoo:fashion")
    assert not METRICS["garments"].reads("zoo:digits-ddpm")
    assert METRICS["digits"].reads("zoo:digits-ddpm")
    assert not METRICS["digits"].reads("models/mine")


def test_held_out_garments_are_read() -> None:
    if not FASHION.is_dir():
        pytest.skip("needs dataset-fashion-mnist")
    images, labels = (each[:2000] for each in fashion()["held_out"])
    assert (GARMENTS.classify(images)[0] == labels).double().mean() > 0.88
    assert GARMENTS.evaluate(images)["fd.garments"] < 3

"""Projections of a run onto GPUs that are not at hand."""

from __future__ import annotations

from dqtool.runtimes.cuda.model import GPUS
from dqtool.stages.planning.estimate import on_gpus

MACS = 10**12


def test_time_follows_the_rates_and_memory_the_weights() -> None:
    h100 = GPUS["H100"]
    assert h100.float_peak == 132 * 1.755e9 * 128  # 29.6 T multiply-adds a second
    # 8 s to start, then 1000 passes of 1e12 multiply-adds at 0.4 of the peak: 84 s
    text = on_gpus({"distill": 1000.0}, MACS, 0, 10**9)
    assert "H100 1m32s" in text
    assert text.endswith("with 1.0 GB of weights and moments")


def test_activations_are_named_beside_the_weights() -> None:
    text = on_gpus({}, MACS, 0, 10**9, 2 * 10**9)
    assert text.endswith("with 1.0 GB of weights and moments, and up to 2.0 GB of activations, or what is free")


def test_small_gpus_are_left_out() -> None:
    text = on_gpus({}, MACS, 0, 60 * 10**9)
    assert "H200" in text and "A100" in text and "RTX 4090" not in text
    assert on_gpus({}, MACS, 0, 10**12) == "none of the known ones has 1000.0 GB"

"""Choice of the samples and iterations that a CPU can carry, for `dqtool quantize`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU_WORK", "Training", "samples_that_fit", "training_that_fits"]

CPU_WORK = 14 * 10**12
"""Multiply-accumulates of the forward passes that calibration may take on a CPU, and as many for training, whose passes cost
more. They are chosen for 45 minutes of two cores; no whole run was timed."""
CALIBRATING = 3
"""Forward passes for each sample that is calibrated: one draws it, two measure it."""
LEAST_BATCH, LEAST_ITERS = 8, 60
"""Samples of an iteration and iterations below which training does not go, however large the network."""


@dataclass(frozen=True)
class Training:
    """Iterations for each block and as many over all blocks, and samples in each."""

    iters: int
    batch_size: int


def training_that_fits(macs: int, usual: Training, work: int = CPU_WORK) -> Training:
    """Return the usual training, or a shorter one where its samples take more work than that.

    Batches shrink first: networks that take long have large inputs, each of which holds many positions to fit.

    Args:
        macs: multiply-accumulates of a forward pass with one sample.
        usual: training of networks that are small enough.
        work: multiply-accumulates that the forward passes of all samples may take.
    """
    samples = work // max(1, macs)
    batch = max(LEAST_BATCH, min(usual.batch_size, samples // (2 * usual.iters)))
    iters = max(LEAST_ITERS, min(usual.iters, samples // (2 * batch)))
    return Training(iters, batch)


def samples_that_fit(macs: int, usual: int, least: int, work: int = CPU_WORK) -> int:
    """Return the usual number of calibration samples, or fewer where these take more work than that, but not below `least`."""
    return max(min(least, usual), min(usual, work // (CALIBRATING * max(1, macs))))

"""Inputs of layers before and after dilation, measured on a calibrated artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import Artifact, Manifest
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.nn.statistics import collect
from dqtool.training.data import Trajectory

__all__ = ["DilatedInput", "dilated_inputs"]

BUDGET = 4 * 10**11
"""Most multiply-accumulates to measure values before dilation: about 15 seconds on two cores."""
FEWEST_STEPS = 4
"""Least time steps that are measured, whatever they cost."""
BINS = 96
"""Bins of the histograms that a page draws."""


@dataclass
class DilatedInput:
    """Input of a layer over the steps, in the float model (`before`) and divided by its dilation (`after`).

    `before` and `after` are shares of the values `[T, BINS]` in equal bins over [lo, hi]; the ranges are (smallest, largest)
    of each step. `samples` counts the samples of a step that `before` was measured on.
    """

    name: str
    timesteps: list[float]
    lo: float
    hi: float
    before: list[list[float]]
    after: list[list[float]]
    range_before: list[tuple[float, float]]
    range_after: list[tuple[float, float]]
    samples: int


def dilated_inputs(
    calibrated: Artifact, teacher: Callable[[], nn.Module], per_step: int, most: int = 3
) -> list[DilatedInput]:
    """Return the `most` inputs whose range dilation narrows most.

    Values after dilation are the artifact's histograms. Values before it are measured: the full-precision network that
    `teacher` builds runs on `per_step` samples of each step, or as many as `BUDGET` allows.

    Raises:
        ArtifactError: no family serves the model's class.
    """
    manifest, tensors = calibrated.manifest, checked_tensors(calibrated)
    ratios = manifest.metrics.activation_range_ratios or {}
    measured_names = {key.removesuffix(".histogram") for key in tensors if key.endswith(".histogram")}
    dilated = [name for name in ratios if f"{name}.dilation" in tensors and name in measured_names]
    chosen = sorted(dilated, key=lambda name: ratios[name])[:most]
    if not chosen:
        return []
    timesteps, rows = tensors["timesteps"], tensors["trajectory.rows"]
    macs = sum(layer.macs for layer in manifest.layers) or 1
    affordable = BUDGET // (2 * macs)  # `collect` runs every sample twice
    chosen_rows = _evenly(len(timesteps), max(FEWEST_STEPS, min(len(timesteps), affordable)))
    samples = max(1, min(per_step, affordable // len(chosen_rows)))
    infos = [info for info in layer_infos(manifest.layers) if info.name in chosen]
    network = teacher()
    measured = collect(network, infos, {}, _steps(manifest, network, tensors, chosen_rows, samples))
    used = int(min(samples, int((rows == chosen_rows[0]).sum())))
    found = []
    for name in chosen:
        before, after = measured[f"{name}.histogram"], tensors[f"{name}.histogram"][chosen_rows]
        range_before, range_after = measured[f"{name}.range"], tensors[f"{name}.range"][chosen_rows]
        lo = float(torch.minimum(range_before[:, 0].min(), range_after[:, 0].min()))
        hi = float(torch.maximum(range_before[:, 1].max(), range_after[:, 1].max()))
        found.append(
            DilatedInput(
                name,
                timesteps[chosen_rows].tolist(),
                lo,
                hi,
                _rebin(before, range_before, lo, hi),
                _rebin(after, range_after, lo, hi),
                [(float(a), float(b)) for a, b in range_before],
                [(float(a), float(b)) for a, b in range_after],
                used,
            )
        )
    return found


def _steps(
    manifest: Manifest, network: nn.Module, tensors: Mapping[str, Tensor], rows: Sequence[int], samples: int
) -> Iterator[Callable[[], None]]:
    """Yield a function for each step that runs `network` on the first samples of the step, as `calibrate` chooses them."""
    family, _ = network_of(manifest.network)
    points = Trajectory.from_tensors(tensors)
    with report.progress("report: activations before dilation", len(rows)) as progress:
        for row in rows:
            mine = (points.rows == row).nonzero()[:samples, 0]

            def run(mine: Tensor = mine, timestep: Tensor = points.timesteps[row]) -> None:
                family.predict(network, points.x[mine], timestep, points.conditions_of(mine))

            yield run
            progress.advance()


def _evenly(total: int, count: int) -> list[int]:
    """Return `count` numbers of `range(total)`, evenly spaced, with both ends."""
    if count >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


def _rebin(histogram: Tensor, span: Tensor, lo: float, hi: float) -> list[list[float]]:
    """Return shares `[T, BINS]` of a histogram in equal bins over [lo, hi]. Values are spread evenly within each old bin."""
    import numpy as np

    edges = np.linspace(lo, hi, BINS + 1)
    shares = []
    for counts, (low, high) in zip(histogram.double().numpy(), span.double().numpy(), strict=True):
        if high <= low:  # one value only
            share = np.zeros(BINS)
            share[min(BINS - 1, int((low - lo) / (hi - lo) * BINS)) if hi > lo else 0] = 1.0
        else:
            summed = np.concatenate([[0.0], counts.cumsum()]) / max(counts.sum(), 1)
            share = np.diff(np.interp(edges, np.linspace(low, high, len(counts) + 1), summed))
        shares.append([float(x) for x in share])
    return shares

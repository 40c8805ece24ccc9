"""Figures that no stage records, computed from the artifacts: errors of weights and activations, values before dilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import Artifact, Manifest
from dqtool.core.affine import lowest_code
from dqtool.core.bits import AttentionBits, bits_from_json
from dqtool.core.dilation import broadcast_scale
from dqtool.core.packing import unpack
from dqtool.core.quantization_error import error_parts, histogram_error
from dqtool.models.networks.loading import network_of
from dqtool.models.networks.packed import layer_infos
from dqtool.nn.attention import OPERANDS
from dqtool.nn.statistics import collect
from dqtool.page.results import Result
from dqtool.training.data import Trajectory

__all__ = ["DilatedInput", "Errors", "Parts", "dilated_inputs", "quantization_errors"]

BUDGET = 4 * 10**11
"""Multiply-accumulates spent on the values before dilation: about a quarter of a minute of two cores."""
FEWEST_STEPS = 4
BINS = 96


@dataclass(frozen=True)
class Parts:
    """Squared errors relative to the values' own sum of squares; `total` is what the artifact really has."""

    clipping: float
    rounding: float
    total: float


@dataclass
class Errors:
    """Errors of one quantized artifact: of each layer's weights, and of each quantized activation at each step `[T]`."""

    timesteps: list[float]
    weights: dict[str, Parts]
    activations: dict[str, list[Parts]]


@dataclass
class DilatedInput:
    """A layer's input over the steps, as the layer reads it in the float model (`before`) and divided by its dilation
    (`after`): shares of all values in `BINS` equal bins over [lo, hi], and the widest values `[T, 2]`."""

    name: str
    timesteps: list[float]
    lo: float
    hi: float
    before: list[list[float]]
    after: list[list[float]]
    range_before: list[tuple[float, float]]
    range_after: list[tuple[float, float]]
    samples: int


def quantization_errors(result: Result) -> Errors:
    """Errors of a result's distilled artifact against the calibrated one it was made from.

    Weights: dequantized against dilated full-precision ones, so that training shows in `total`; the two parts are those
    of the full-precision weights on the artifact's grid. Activations: the artifact's tables on the calibrated histograms.

    Where training moved a layer's factors, weights follow channel by channel, and its histograms, which know no
    channels, by the geometric mean. Layers whose learned factors were folded away afterwards have no entry.

    Raises:
        ArtifactError: an artifact is missing or damaged.
    """
    distilled, calibrated = result.open("distill"), result.open("calibrate")
    packed, known = distilled.tensors(), calibrated.tensors()
    producers = {name for layer in distilled.manifest.layers for name in _folded_into(layer)}
    weights: dict[str, Parts] = {}
    activations: dict[str, list[Parts]] = {}
    steps = len(known["timesteps"])
    for layer in distilled.manifest.layers:
        name, widths = layer["name"], bits_from_json(layer["kind"], layer["bits"])
        if isinstance(widths, AttentionBits):
            for operand in OPERANDS:
                bits = widths.of(operand)
                low = lowest_code(bits, symmetric=operand != "probs")
                default = 0 if operand == "probs" else 2 ** (bits - 1)
                parts = _activation(packed, known, f"{name}.{operand}", f"{name}.{operand}", bits, low, default, steps)
                if parts is not None:
                    activations[f"{name}.{operand}"] = parts
            continue
        if (layer.get("scaling") or {}).get("learned") and _folded_into(layer):
            continue
        moved = _moved(packed, known, name)
        if f"{name}.weight_packed" in packed:
            reference = known[f"{name}.weight"]
            if moved is not None:
                reference = reference * broadcast_scale(moved, reference, int(layer["groups"]))
            weights[name] = _weight(packed, reference, name, widths.weight, name in producers)
        mean = 1.0 if moved is None else float(moved.log().mean().exp())
        parts = _activation(packed, known, name, f"{name}.input", widths.input, 0, 0, steps, 1 / mean)
        if parts is not None:
            activations[name] = parts
    return Errors(known["timesteps"].tolist(), weights, activations)


def dilated_inputs(
    calibrated: Artifact, teacher: Callable[[], nn.Module], per_step: int, most: int = 3
) -> list[DilatedInput]:
    """The inputs whose range dilation narrows most. After: the artifact's histograms; before: the full-precision network
    that `teacher` builds, run again over `per_step` samples of each step, or over as many as `BUDGET` allows.

    Raises:
        ArtifactError: the model's class is not known here.
    """
    manifest, tensors = calibrated.manifest, calibrated.tensors()
    ratios: Mapping[str, float] = manifest.metrics.get("activation_range_ratios", {})
    measured_names = {key.removesuffix(".histogram") for key in tensors if key.endswith(".histogram")}
    dilated = [name for name in ratios if f"{name}.dilation" in tensors and name in measured_names]
    chosen = sorted(dilated, key=lambda name: ratios[name])[:most]
    if not chosen:
        return []
    timesteps, rows = tensors["timesteps"], tensors["trajectory.rows"]
    macs = sum(int(layer["macs"]) for layer in manifest.layers) or 1
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


def _weight(packed: Mapping[str, Tensor], reference: Tensor, name: str, bits: int, is_producer: bool) -> Parts:
    rows = reference.float().flatten(1)
    scale = packed[f"{name}.weight_scale"].float()
    centre = torch.full_like(scale, 2 ** (bits - 1))
    zero_point = packed.get(f"{name}.weight_zero_point", centre).to(scale.dtype)
    codes = unpack(packed[f"{name}.weight_packed"], bits, rows.shape[1]).to(scale.dtype) - zero_point[:, None]
    if is_producer:
        # Another layer's dilation was folded into the scale of these rows: the scale that fits the weights undoes it.
        fitted = (codes * rows).sum(1) / codes.square().sum(1)
        scale = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)
    power = float(rows.double().square().sum())
    total = float((codes * scale[:, None] - rows).double().square().sum())
    clipping, rounding = error_parts(rows, scale[:, None], zero_point[:, None], bits, lowest_code(bits, symmetric=True))
    return _parts(float(clipping.double().sum()), float(rounding.double().sum()), total, power)


def _activation(
    packed: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
    name: str,
    table: str,
    bits: int,
    low: int,
    default_zero: int,
    steps: int,
    factor: float = 1.0,
) -> list[Parts] | None:
    """Parts per step, heads summed; None where this activation stays float, or another layer's quantizer serves it. The
    values are those of the histogram times `factor`."""
    scale = packed.get(f"{table}_scale" if table.endswith(".input") else f"{name}_scale")
    histogram = known.get(f"{name}.histogram")
    if scale is None or histogram is None:
        return None
    zero_point = packed.get(f"{table}_zero_point")
    zero_point = torch.full_like(scale, default_zero) if zero_point is None else zero_point.to(scale.dtype)
    span = known[f"{name}.range"] * factor
    shape = histogram.shape[:-1]  # [T] or [T, H]; a static table has one row for all steps
    lo, hi, scale, zero_point = (x.expand(shape).flatten() for x in (span[..., 0], span[..., 1], scale, zero_point))
    sums = histogram_error(histogram.flatten(0, -2), lo, hi, scale, zero_point, bits, low)
    clipping, rounding, power = (x.double().view(steps, -1).sum(1).tolist() for x in sums)
    return [_parts(c, r, c + r, p) for c, r, p in zip(clipping, rounding, power, strict=True)]


def _parts(clipping: float, rounding: float, total: float, power: float) -> Parts:
    return Parts(clipping / power, rounding / power, total / power) if power else Parts(0.0, 0.0, 0.0)


def _moved(packed: Mapping[str, Tensor], known: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Trained factors over calibrated ones, `[C_in]`; None where they are as they were, or folded away."""
    before, after = known.get(f"{name}.dilation"), packed.get(f"{name}.dilation")
    if before is None or after is None or torch.equal(before, after):
        return None
    return after / before


def _folded_into(layer: Mapping[str, Any]) -> Sequence[str]:
    folded = (layer.get("scaling") or {}).get("folded_into") or ()
    return [folded] if isinstance(folded, str) else list(folded)


def _steps(
    manifest: Manifest, network: nn.Module, tensors: Mapping[str, Tensor], rows: Sequence[int], samples: int
) -> Iterator[Callable[[], None]]:
    """One function per step that runs `network` over the step's first samples, as `calibrate` chooses them."""
    family, _ = network_of(manifest.model)
    points = Trajectory.from_tensors(tensors)
    with report.progress("report: activations before dilation", len(rows)) as progress:
        for row in rows:
            mine = (points.rows == row).nonzero()[:samples, 0]

            def run(mine: Tensor = mine, timestep: Tensor = points.timesteps[row]) -> None:
                family.predict(network, points.x[mine], timestep, points.conditions_of(mine))

            yield run
            progress.advance()


def _evenly(total: int, count: int) -> list[int]:
    """`count` of `range(total)`, evenly spaced, ends included."""
    if count >= total:
        return list(range(total))
    return sorted({round(i * (total - 1) / max(1, count - 1)) for i in range(count)})


def _rebin(histogram: Tensor, span: Tensor, lo: float, hi: float) -> list[list[float]]:
    """Shares of the values of each step in `BINS` bins over [lo, hi], values spread evenly within each of the old bins."""
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

"""Errors of quantized weights and activations, computed from a distilled artifact and its calibrated one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dqtool.artifacts.records import LayerRecord
from dqtool.core.affine import lowest_code
from dqtool.core.bits import AttentionBits, bits_from_json
from dqtool.core.cost import FLOAT32
from dqtool.core.dilation import broadcast_scale
from dqtool.core.packing import unpack
from dqtool.core.quantization_error import error_parts, histogram_error
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.nn.attention import OPERANDS
from dqtool.nn.branch import BRANCH, LowRankBranch
from dqtool.page.results import Result

__all__ = ["Errors", "Parts", "quantization_errors"]


@dataclass(frozen=True)
class Parts:
    """Squared errors relative to the sum of squares of the values.

    `total` is the error of the artifact. `clipping` and `rounding` are those of its grid, before training moved the values.
    """

    clipping: float
    rounding: float
    total: float


@dataclass
class Errors:
    """Errors of one quantized artifact: of the weights of each layer, and of each quantized activation at each step `[T]`."""

    timesteps: list[float]
    weights: dict[str, Parts]
    activations: dict[str, list[Parts]]


def quantization_errors(result: Result) -> Errors:
    """Return the errors of a result's distilled artifact against the calibrated artifact that it was made from.

    Weights are compared dequantized with dilated full-precision ones, so that `total` includes the changes of training;
    `clipping` and `rounding` are the errors of the full-precision weights on the artifact's grid. Errors of activations are
    those of the artifact's step tables on the calibrated histograms.

    If training moved a layer's factors, its weights are rescaled channel by channel. Its histograms, which have no channels,
    are rescaled by the geometric mean. Layers whose learned factors were folded away afterwards have no entry.

    Raises:
        ArtifactError: an artifact is missing or damaged.
    """
    distilled, calibrated = result.open("distill"), result.open("calibrate")
    packed, known = checked_tensors(distilled), checked_tensors(calibrated)
    producers = {name for layer in distilled.manifest.layers for name in _folded_into(layer)}
    weights: dict[str, Parts] = {}
    activations: dict[str, list[Parts]] = {}
    steps = len(known["timesteps"])
    for layer in distilled.manifest.layers:
        name, widths = layer.name, bits_from_json(layer.kind, layer.bits or FLOAT32)
        if isinstance(widths, AttentionBits):
            for operand in OPERANDS:
                bits = widths.of(operand)
                low = lowest_code(bits, symmetric=operand != "probs")
                default = 0 if operand == "probs" else 2 ** (bits - 1)
                parts = _activation_errors(
                    packed, known, f"{name}.{operand}", f"{name}.{operand}", bits, low, default, steps
                )
                if parts is not None:
                    activations[f"{name}.{operand}"] = parts
            continue
        if layer.scaling is not None and layer.scaling.learned and _folded_into(layer):
            continue
        moved = _factor_change(packed, known, name)
        if f"{name}.weight_packed" in packed:
            reference = known[f"{name}.weight"]
            if moved is not None:
                reference = reference * broadcast_scale(moved, reference, layer.groups)
            branch = _branch_weight(packed, name)
            weights[name] = _weight_error(packed, reference, name, widths.weight, name in producers, branch)
        mean = 1.0 if moved is None else float(moved.log().mean().exp())
        parts = _activation_errors(packed, known, name, f"{name}.input", widths.input, 0, 0, steps, 1 / mean)
        if parts is not None:
            activations[name] = parts
    return Errors(known["timesteps"].tolist(), weights, activations)


def _branch_weight(packed: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the part of a layer's weight that its low-rank branch holds, in the units of the quantized part; None without one."""
    down, up = (packed.get(f"{name}.{BRANCH}.{key}") for key in ("down", "up"))
    return None if down is None or up is None else LowRankBranch(down, up).weight(packed.get(f"{name}.dilation"))


def _weight_error(
    packed: Mapping[str, Tensor], reference: Tensor, name: str, bits: int, is_producer: bool, branch: Tensor | None
) -> Parts:
    whole = reference.float().flatten(1)
    rows = whole if branch is None else whole - branch.flatten(1)
    scale = packed[f"{name}.weight_scale"].float()
    centre = torch.full_like(scale, 2 ** (bits - 1))
    zero_point = packed.get(f"{name}.weight_zero_point", centre).to(scale.dtype)
    codes = unpack(packed[f"{name}.weight_packed"], bits, rows.shape[1]).to(scale.dtype) - zero_point[:, None]
    if is_producer:
        # Another layer's dilation was folded into the scales of these rows. Scales fitted to the weights are without it.
        fitted = (codes * rows).sum(1) / codes.square().sum(1)
        scale = torch.where(torch.isfinite(fitted) & (fitted > 0), fitted, scale)
    power = float(whole.double().square().sum())
    total = float((codes * scale[:, None] - rows).double().square().sum())
    clipping, rounding = error_parts(rows, scale[:, None], zero_point[:, None], bits, lowest_code(bits, symmetric=True))
    return _parts(float(clipping.double().sum()), float(rounding.double().sum()), total, power)


def _activation_errors(
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
    """Return the errors of an activation at each step, summed over heads. Its values are those of the histogram times `factor`.

    Return None if the activation stays float or another layer's quantizer serves it.
    """
    scale = packed.get(f"{table}_scale" if table.endswith(".input") else f"{name}_scale")
    histogram = known.get(f"{name}.histogram")
    if scale is None or histogram is None:
        return None
    zero_point = packed.get(f"{table}_zero_point")
    zero_point = torch.full_like(scale, default_zero) if zero_point is None else zero_point.to(scale.dtype)
    span = known[f"{name}.range"] * factor
    shape = histogram.shape[:-1]  # [T] or [T, H]; a static table has one row, which is expanded to all steps
    lo, hi, scale, zero_point = (x.expand(shape).flatten() for x in (span[..., 0], span[..., 1], scale, zero_point))
    sums = histogram_error(histogram.flatten(0, -2), lo, hi, scale, zero_point, bits, low)
    clipping, rounding, power = (x.double().view(steps, -1).sum(1).tolist() for x in sums)
    return [_parts(c, r, c + r, p) for c, r, p in zip(clipping, rounding, power, strict=True)]


def _parts(clipping: float, rounding: float, total: float, power: float) -> Parts:
    return Parts(clipping / power, rounding / power, total / power) if power else Parts(0.0, 0.0, 0.0)


def _factor_change(packed: Mapping[str, Tensor], known: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return trained factors over calibrated ones `[C_in]`; None if they are unchanged or folded away."""
    before, after = known.get(f"{name}.dilation"), packed.get(f"{name}.dilation")
    if before is None or after is None or torch.equal(before, after):
        return None
    return after / before


def _folded_into(layer: LayerRecord) -> Sequence[str]:
    return (layer.scaling.folded_into if layer.scaling is not None else None) or ()

"""`compressed-tensors`: packed linear layers with the names, packing and configuration of that library (pack-quantized).

The format covers linear layers with one scale and zero point per out-channel, and inputs that are float or quantized
with one scale for all steps. It has no convolutions, step tables, quantized attention products or inputs divided by a
dilation. Weights keep their bits on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqtool.artifacts import Artifact
from dqtool.artifacts.tensorfile import save_tensors
from dqtool.core.affine import SYMMETRIC_BITS
from dqtool.core.bits import AttentionBits, LayerBits
from dqtool.core.dilation import broadcast_scale
from dqtool.core.packing import pack
from dqtool.core.rotation import rotate_weight
from dqtool.errors import ArtifactError
from dqtool.formats import Exported, require
from dqtool.models.components.export_layout import WEIGHTS
from dqtool.models.networks.checked_artifacts import checked_tensors
from dqtool.models.networks.packed import plans_of
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.prediction import NAME as PREDICTION

__all__ = ["EXTRA", "FORMAT", "prepare"]

EXTRA = "compressed-tensors"
FORMAT = "pack-quantized"
NAMED = 1
"""Layers that an error names of each kind."""
LONGEST = 300
"""Most characters of the reasons in an error; beyond it layers are counted and not named."""


def prepare(distilled: Artifact) -> Exported:
    """Return the network's tensors under that library's names, and its `quantization_config`.

    Raises:
        ArtifactError: the format can't hold some layers, which are named.
        EnvironmentFault: compressed-tensors is not installed.
    """
    manifest, tensors = distilled.manifest, checked_tensors(distilled)
    plans = plans_of(manifest)
    refuse(plans, tensors, distilled.given)
    require("compressed_tensors", EXTRA)
    state = {name: t for name, t in tensors.items() if name != "timesteps"}
    for plan in plans:
        if plan.info.kind != "attention":
            _convert(state, plan)
    config = {**manifest.network.config, "quantization_config": quantization_config(plans)}

    def write(directory: Path) -> None:
        save_tensors(directory / WEIGHTS, state)

    return Exported(config, manifest.layers, write)


def refuse(plans: Sequence[LayerPlan], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse a network that the format can't hold.

    Raises:
        ArtifactError: names every reason and the first layer it applies to.
    """
    problems: dict[str, list[str]] = {}
    for plan in plans:
        reason = _obstacle(plan, tensors)
        if reason is not None:
            problems.setdefault(reason, []).append(plan.info.name)
    if f"{PREDICTION}.scale" in tensors:
        problems["predictions are corrected at each step (distill --no-correct-noise)"] = []
    if not any(_quantized_linear(plan) for plan in plans):
        problems["no linear layer is quantized"] = []
    if not problems:
        return
    said = _listed(problems, NAMED)
    raise ArtifactError(
        f"compressed-tensors can't hold this network: {said if len(said) <= LONGEST else _listed(problems, 0)}",
        where=where,
        fix="Quantize linear weights only (calibrate --scaling none; distill --bits 4/16 --keep 'CONVOLUTIONS=16/16'), or "
        "export with --format dq",
    )


def _listed(problems: Mapping[str, Sequence[str]], named: int) -> str:
    """Return the reasons, each with the names of its first layers and the count of the others."""
    said = []
    for reason, names in problems.items():
        shown, more = list(names[:named]), len(names) - named
        if more > 0:
            shown.append(f"{more} more" if shown else f"{more} layers")
        said.append(f"{reason}: {' and '.join(shown)}" if shown else reason)
    return "; ".join(said)


def quantization_config(plans: Sequence[LayerPlan]) -> dict[str, Any]:
    """Return the `quantization_config` as the library writes it: one group of layers for each combination of bits."""
    import compressed_tensors
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    groups: dict[tuple[int, int], list[str]] = {}
    for plan in plans:
        if (bits := _quantized_linear(plan)) is not None:
            groups.setdefault((bits.weight, bits.input), []).append(plan.info.name)
    schemes: dict[str, Any] = {}
    for index, ((weight, activation), names) in enumerate(sorted(groups.items())):
        inputs = QuantizationArgs(num_bits=activation, symmetric=False, strategy="tensor", dynamic=False)
        schemes[f"group_{index}"] = QuantizationScheme(
            targets=names,
            weights=QuantizationArgs(
                num_bits=weight, symmetric=weight == SYMMETRIC_BITS, strategy="channel", dynamic=False
            ),
            input_activations=inputs if activation <= SYMMETRIC_BITS else None,
            format=FORMAT,
        )
    config = QuantizationConfig(
        config_groups=schemes, format=FORMAT, quantization_status=QuantizationStatus.COMPRESSED, ignore=[]
    )
    return {"version": compressed_tensors.__version__, **config.model_dump(mode="json")}


def _quantized_linear(plan: LayerPlan) -> LayerBits | None:
    """Return the bits of a linear layer whose weight is quantized; None for any other layer."""
    bits = plan.bits
    if plan.info.kind == "linear" and isinstance(bits, LayerBits) and bits.quantizes_weight:
        return bits
    return None


def _obstacle(plan: LayerPlan, tensors: Mapping[str, Tensor]) -> str | None:
    name, bits = plan.info.name, plan.bits
    if isinstance(bits, AttentionBits):
        return "attention products are quantized" if f"{name}.q_scale" in tensors else None
    if not bits.quantizes_weight and not bits.quantizes_input:
        return None
    if plan.info.kind != "linear":
        return "convolutions are quantized"
    if plan.info.rotation:
        return "the input is rotated"
    if plan.low_rank:
        return "a low-rank branch stands beside the product"
    if bits.quantizes_input and not bits.quantizes_weight:
        return "only the input is quantized"
    if bits.quantizes_input:
        for key in ("input_scale", "input_zero_point"):
            table = tensors[f"{name}.{key}"]
            if bool((table != table[0]).any()):
                return f"the quantizers of {len(table)} steps differ"
    return "the input is divided by a dilation" if f"{name}.dilation" in tensors else None


def _convert(state: dict[str, Tensor], plan: LayerPlan) -> None:
    """Rename and repack the tensors of one layer, in place."""
    name, bits = plan.info.name, plan.bits
    if isinstance(bits, AttentionBits) or not bits.quantizes_weight:
        dilation = state.pop(f"{name}.dilation", None)
        if dilation is not None:
            weight = state[f"{name}.weight"]
            state[f"{name}.weight"] = weight / broadcast_scale(dilation, weight, plan.info.groups)
        state[f"{name}.weight"] = rotate_weight(state[f"{name}.weight"], plan.info.rotation)
        return
    # The library keeps codes minus 2^(b-1) and adds that again when it packs, so that its packed words equal ours.
    state[f"{name}.weight_scale"] = state[f"{name}.weight_scale"].view(-1, 1).clone()
    state[f"{name}.weight_shape"] = state[f"{name}.weight_shape"].to(torch.int64)
    zero_point = state.pop(f"{name}.weight_zero_point", None)
    if zero_point is not None:  # the library packs them along the out-channels
        state[f"{name}.weight_zero_point"] = pack(zero_point.view(1, -1).to(torch.int32), bits.weight).t().contiguous()
    if bits.quantizes_input:
        offset = 2 ** (bits.input - 1)
        state[f"{name}.input_scale"] = state[f"{name}.input_scale"][:1].clone()
        stored = state[f"{name}.input_zero_point"][:1].to(torch.int16)
        state[f"{name}.input_zero_point"] = (stored - offset).to(torch.int8)

"""Figures of a cell: those that its stages recorded, and errors measured on its artifacts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dqtool.artifacts import open_artifact, read_manifest
from dqtool.artifacts.jsonvalues import Json

__all__ = ["FIGURES_VERSION", "cell_figures"]

FIGURES_VERSION = 2
"""Version of the set of figures, recorded with a cell as `measures`. Version 2 added `fd.digits_from_reference`."""
SHORT_LIST = 256
"""Most values of a list that a cell keeps."""


def cell_figures(artifacts: Mapping[str, Path], wanted_bits: str) -> dict[str, dict[str, Json]]:
    """Return the figures of a chain of artifacts by stage, and its `errors`.

    `wanted_bits` are the bits at which weights are compared if the chain is not quantized.
    """
    found = {stage: _recorded(path) for stage, path in artifacts.items()}
    if "calibrate" in artifacts:
        errors = _errors(artifacts, wanted_bits)
        layers = read_manifest(artifacts["eval"]).evaluation.layer_errors if "eval" in artifacts else {}
        if layers:
            errors["output"] = sum(value**0.5 for value in layers.values()) / len(layers)
        found["errors"] = {**errors}
    return found


_NOT_KEPT = ("blocks", "layer_errors", "output_reads", "activation_range_ratios", "kept_float", "samples_per_step")


def _recorded(path: Path) -> dict[str, Json]:
    """Return the metrics of a manifest, without those of single layers, and the seconds of its stage."""
    manifest = read_manifest(path)
    kept = {
        key: value
        for key, value in manifest.metrics.to_json().items()
        if key not in _NOT_KEPT and not (isinstance(value, list) and len(value) > SHORT_LIST)
    }
    return {"seconds": manifest.seconds} | kept


def _errors(artifacts: Mapping[str, Path], wanted_bits: str) -> dict[str, float]:
    """Return errors of weights and activations, means over layers.

    - `weight_scale_ratio`: step sizes of weights after scaling over those before, by least squared error (Table 13).
    - `*_clipping`, `*_rounding`: shares of the squared error (App. F).
    - `*_error`: squared error relative to the energy of the values.
    - `bound`: bound of a layer's relative output error, `e_w + e_x (1 + e_w)` with relative root mean squares (Eq. 9).
    """
    from dqtool.core.bits import parse_bits

    bits = parse_bits(wanted_bits)
    errors = _weight_scale_ratio(artifacts["calibrate"], min(8, bits.weight))
    if "distill" in artifacts:
        errors |= _quantization_errors(artifacts)
    return errors


def _weight_scale_ratio(path: Path, bits: int) -> dict[str, float]:
    from dqtool.core.affine import search_weight
    from dqtool.core.dilation import broadcast_scale
    from dqtool.models.networks.checked_artifacts import checked_tensors
    from dqtool.models.networks.packed import layer_infos

    calibrated = open_artifact(path)
    tensors = checked_tensors(calibrated)
    ratios = []
    for info in layer_infos(calibrated.manifest.layers):
        scale = tensors.get(f"{info.name}.dilation")
        if scale is not None:
            weight = tensors[f"{info.name}.weight"]
            after, _ = search_weight(weight, bits, symmetric=False)
            before, _ = search_weight(weight / broadcast_scale(scale, weight, info.groups), bits, symmetric=False)
            ratios.append(float((after / before).mean()))
    return {"weight_scale_ratio": sum(ratios) / len(ratios)} if ratios else {}


def _quantization_errors(artifacts: Mapping[str, Path]) -> dict[str, float]:
    from dqtool.page.quantization_errors import quantization_errors
    from dqtool.page.results import Result

    chain = {stage: path for stage, path in artifacts.items() if stage in ("calibrate", "distill")}
    found = quantization_errors(Result("cell", artifacts["distill"], read_manifest(artifacts["distill"]), chain))
    result: dict[str, float] = {}
    weights = list(found.weights.values())
    activations = [part for parts in found.activations.values() for part in parts]
    for name, parts in (("weight", weights), ("activation", activations)):
        clipping, rounding = sum(p.clipping for p in parts), sum(p.rounding for p in parts)
        if clipping + rounding > 0:
            result[f"{name}_clipping"] = clipping / (clipping + rounding)
            result[f"{name}_rounding"] = rounding / (clipping + rounding)
        if parts:
            result[f"{name}_error"] = sum(p.total for p in parts) / len(parts)
    bounds = []
    for name, part in found.weights.items():
        steps = found.activations.get(name)
        if steps:
            e_w, e_x = part.total**0.5, (sum(p.total for p in steps) / len(steps)) ** 0.5
            bounds.append(e_w + e_x * (1 + e_w))
    if bounds:
        result["bound"] = sum(bounds) / len(bounds)
    return result

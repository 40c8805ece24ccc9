"""`dqtool inspect`: what an artifact, an exported directory, a report or a model is. Reads headers only: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from dqtool.artifacts import manifest_path, open_artifact
from dqtool.artifacts.reading import MANIFEST_BYTES, load_json, parse_json, read_file
from dqtool.core.cost import bops, bops_ratio
from dqtool.models.sampling.fitted import FITTED, sentence
from dqtool.models.sources.resolve import ModelSource, resolve_model
from dqtool.report import format_seconds, table_lines

__all__ = ["describe", "render"]

Layer = Mapping[str, Any]


def describe(given: str) -> dict[str, Any]:
    """All that is known of what is at `given`, as plain JSON values; an artifact's data is verified.

    An artifact gives its manifest, a model its config and tensors; both have `kind`, `path`, `bytes` and `parameters_total`.
    Raises `EnvironmentFault` when nothing is there, `ArtifactError` for something else or something damaged.
    """
    if not given.startswith("zoo:") and _has_manifest(given):
        return _describe_artifact(given)
    return _describe_model(resolve_model(given))


def render(description: Mapping[str, Any]) -> list[str]:
    """The description as lines of text."""
    return _render_artifact(description) if description["kind"] == "artifact" else _render_model(description)


def _has_manifest(given: str) -> bool:
    note = manifest_path(given)
    if not note.is_file():
        return False
    if Path(given).is_dir() or note == Path(given):
        return True
    # Weights called X.safetensors may have an X.json that is not ours, such as a config.json.
    try:
        payload = parse_json(read_file(note, MANIFEST_BYTES))
    except ValueError:
        return True  # damaged: opening it will say so
    return isinstance(payload, dict) and "format" in payload


def _describe_artifact(given: str) -> dict[str, Any]:
    artifact = open_artifact(given)
    note = load_json(manifest_path(given), MANIFEST_BYTES)
    files = note.get("files") or ({given: note["file"]} if "file" in note else {})
    size = sum(entry["bytes"] for entry in files.values()) if files else artifact.path.stat().st_size
    note |= {"kind": "artifact", "path": given, "bytes": size, "sha256": artifact.sha256}
    weights = [path for path in artifact.manifest.files or {} if path.endswith(".safetensors")]
    if artifact.manifest.file is not None:
        note["tensors"] = len(artifact.tensor_names())
    elif weights:
        note["tensors"] = sum(len(artifact.tensor_names(path)) for path in weights)
    note["parameters_total"] = sum(prod(layer["shape"]) for layer in note["layers"] if layer["kind"] != "attention")
    return note


def _describe_model(source: ModelSource) -> dict[str, Any]:
    tensors = source.tensor_entries()
    return {
        "kind": "model",
        "path": source.given,
        "class": source.class_name,
        "config": source.config,
        "pipeline": None if source.model_index is None else source.model_index.get("_class_name"),
        "scheduler": source.scheduler,
        "sha256": source.sha256(),
        "bytes": sum(path.stat().st_size for path in source.weights),
        "parameters_total": sum(prod(entry["shape"]) for entry in tensors.values()),
        "dtypes": sorted({entry["dtype"] for entry in tensors.values()}),
        "tensors": len(tensors),
        "layers": [
            {"name": name.removesuffix(".weight"), "shape": entry["shape"], "dtype": entry["dtype"]}
            for name, entry in tensors.items()
            if name.endswith(".weight") and len(entry["shape"]) > 1
        ],
    }


def _render_model(model: Mapping[str, Any]) -> list[str]:
    lines = _pairs(
        {
            "model": model["path"],
            "network": model["class"],
            "pipeline": model["pipeline"] or "none (a bare component)",
            "scheduler": (model["scheduler"] or {}).get("_class_name", "-"),
            "parameters": f"{model['parameters_total']:,} in {model['tensors']} tensors ({', '.join(model['dtypes'])})",
            "bytes": f"{model['bytes']:,}",
            "sha256": model["sha256"],
        }
    )
    rows = [(layer["name"], _shape(layer), f"{prod(layer['shape']):,}") for layer in model["layers"]]
    return [*lines, "", f"Layers ({len(rows)})", *table_lines(["layer", "weight", "parameters"], rows)]


def _render_artifact(note: Mapping[str, Any]) -> list[str]:
    versions = note["environment"].get("versions", {})
    lines = _pairs(
        {
            "artifact": f"{note['path']}  (intact)",
            "stage": note["stage"],
            "made by": f"dqtool {note['version']}, torch {versions.get('torch', '?')}, "
            f"in {format_seconds(note['seconds'])}",
            "inputs": "; ".join(_input(entry) for entry in note["inputs"]) or "-",
            "network": f"{note['model'].get('class', '?')}  (from {note['model'].get('source', '?')})",
            "sampling": _sampling(note.get("pipeline") or {}),
            **_correction(note["metrics"]),
            "bytes": f"{note['bytes']:,}" + (f" in {note['tensors']} tensors" if "tensors" in note else ""),
            "sha256": note["sha256"],
            "fingerprint": note["fingerprint"],
        }
    )
    lines += ["", "Parameters", *_pairs(_flat(note["parameters"]))]
    figures = _flat(note["metrics"], skip=_per_layer(note["metrics"], note["layers"]))
    if figures:
        lines += ["", "Metrics", *_pairs(figures)]
    if note["layers"]:
        lines += ["", *_layer_lines(note["layers"], note["metrics"])]
    return lines


def _layer_lines(layers: list[Layer], metrics: Mapping[str, Any]) -> list[str]:
    """The table of layers, with the columns that this stage knows, and their sums."""
    has_bits = any("bits" in layer for layer in layers)
    has_branch = any(layer.get("low_rank") for layer in layers)
    has_runs = any("runs" in layer for layer in layers)
    has_scaling = any("scaling" in layer for layer in layers)
    per_layer = _per_layer(metrics, layers)
    columns = ["layer", "kind", "weight", "MACs"]
    columns += (
        ["bits"] * has_bits
        + ["rank"] * has_branch
        + ["runs"] * has_runs
        + ["scaling", "unsaturated", "mean 1/s", "max s", "1/s in"] * has_scaling
    )
    columns += per_layer
    rows = []
    for layer in layers:
        scaling = layer.get("scaling")
        row: list[object] = [layer["name"], layer["kind"], _shape(layer), f"{layer['macs']:,}"]
        if has_bits:
            row.append("/".join(map(str, layer["bits"])) if "bits" in layer else None)
        if has_branch:
            row.append(layer.get("low_rank") or None)
        if has_runs:
            row.append(layer.get("runs", "").partition(":")[0] or None)
        if has_scaling:
            row += (
                [
                    scaling["method"],
                    f"{scaling['unsaturated_share']:.1%}",
                    f"{scaling['mean_inverse']:.3f}",
                    f"{scaling['max']:.2f}",
                    f"groups of {layer['rotation']} rotated"
                    if layer.get("rotation")
                    else ", ".join(scaling.get("folded_into", ["quantizer"])),
                ]
                if scaling
                else [None] * 5
            )
        row += [metrics[key].get(layer["name"]) for key in per_layer]
        rows.append(row)
    weights = [layer for layer in layers if layer["kind"] != "attention"]
    parameters = sum(prod(layer["shape"]) for layer in weights)
    macs = sum(layer["macs"] for layer in layers)
    lines = [f"Layers ({len(layers)}): {parameters:,} weights, {macs:,} MACs per forward pass and sample"]
    if has_bits:
        plain = [{**layer, "bits": layer.get("bits")} for layer in layers]
        lines.append(
            f"{bops(plain) / 1e9:.3f} G bit operations, {bops_ratio(plain):.1f}x fewer than float32; {_shares(weights)}"
        )
    if has_branch:
        lines.append(_branches(layers))
    if has_runs:
        lines += _runs(layers)
    if has_scaling:
        lines.append(_whereabouts(layers))
    return [*lines, *table_lines(columns, rows)]


def _runs(layers: Iterable[Layer]) -> list[str]:
    """Return lines with the number of layers and attention products in int8, and the reasons for the others."""
    lines = []
    for what, kinds in (("layers", ("conv2d", "linear")), ("attention products", ("attention",))):
        told = [layer for layer in layers if layer["kind"] in kinds and "runs" in layer]
        if told:
            count = sum(layer["runs"] == "int8" for layer in told)
            lines.append(f"integer runtimes: {count} of {len(told)} {what} in int8")
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.get("runs", "int8") != "int8":
            reasons.setdefault(layer["runs"], []).append(layer["name"])
    return lines + [
        f"in {reason}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}" for reason, names in reasons.items()
    ]


def _branches(layers: Iterable[Layer]) -> str:
    """Return a line with the number of low-rank branches and their bytes."""
    found = [layer for layer in layers if layer.get("low_rank")]
    size = sum(2 * layer["low_rank"] * (layer["shape"][0] + prod(layer["shape"][1:])) for layer in found)
    return f"low-rank branches in 16 bits: {len(found)} layers, {size:,} bytes"


def _whereabouts(layers: Iterable[Layer]) -> str:
    """Return a line with the number of layers whose factors are folded into producers or applied by input quantizers, and of
    those whose inputs are rotated."""
    scaled = [layer for layer in layers if "scaling" in layer]
    rotated = sum(bool(layer.get("rotation")) for layer in scaled)
    folded = sum("folded_into" in layer["scaling"] for layer in scaled)
    own = len(scaled) - folded - rotated
    line = f"1/s: folded into producers for {folded} layers, part of the input's quantizer for {own}"
    return line + (f"; inputs of {rotated} layers are rotated" if rotated else "")


def _shares(weights: Iterable[Layer]) -> str:
    """`4/4: 91.3% of weights, 8/8: 8.7%`."""
    counts: dict[str, int] = {}
    for layer in weights:
        key = "/".join(map(str, layer["bits"])) if "bits" in layer else "float"
        counts[key] = counts.get(key, 0) + prod(layer["shape"])
    total = sum(counts.values())
    shares = [f"{key}: {count / total:.1%}" for key, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "weights at " + ", ".join(shares)


def _per_layer(metrics: Mapping[str, Any], layers: Iterable[Layer]) -> list[str]:
    """Names of the metrics that are one number for each of some layers: columns of the table."""
    names = {layer["name"] for layer in layers}
    return [
        key
        for key, value in metrics.items()
        if isinstance(value, dict)
        and value
        and names.issuperset(value)
        and all(isinstance(item, int | float) for item in value.values())
    ]


def _flat(values: Mapping[str, Any], prefix: str = "", skip: Iterable[str] = ()) -> dict[str, str]:
    """Nested mappings as `a.b: text`; long lists are counted, not shown."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if key in skip:
            continue
        if isinstance(value, dict) and len(value) <= 12:
            flat |= _flat(value, f"{prefix}{key}.")
        elif isinstance(value, dict | list) and (len(value) > 12 or any(isinstance(v, dict | list) for v in value)):
            flat[prefix + key] = f"{len(value)} entries (see --json)"
        elif isinstance(value, list):
            flat[prefix + key] = ", ".join(_number(item) for item in value) or "-"
        else:
            flat[prefix + key] = _number(value)
    return flat


def _pairs(values: Mapping[str, str]) -> list[str]:
    width = max((len(key) for key in values), default=0)
    return [f"{key.ljust(width)}  {value}" for key, value in values.items()]


def _number(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shape(layer: Layer) -> str:
    return "x".join(map(str, layer["shape"]))


def _input(entry: Mapping[str, Any]) -> str:
    return f"{entry['name']} ({entry.get('stage') or 'model'}, sha256 {entry['sha256'][:12]}…)"


def _sampling(pipeline: Mapping[str, Any]) -> str:
    sampling = pipeline.get("sampling")
    if sampling is None:
        return (pipeline.get("scheduler") or {}).get("_class_name", "-")
    said = f"{sampling['scheduler']['_class_name']}, {sampling['steps']} steps, eta {sampling['eta']:g}"
    if "embedded_guidance" in sampling:
        said += f", embedded guidance {sampling['embedded_guidance']:g}"
    origin = sampling.get("conditions")
    return said if origin is None else f"{said}, {_origin(origin)}"


def _correction(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the line on the sampling that the correction of predictions was fitted with; nothing without one."""
    fitted = metrics.get(FITTED)
    return {"predictions": f"corrected for {sentence(fitted)}"} if isinstance(fitted, Mapping) else {}


def _origin(conditions: Mapping[str, Any]) -> str:
    """`conditions from FILE`, `random conditions`."""
    if conditions["from"] == "random":
        return "random conditions"
    return f"conditions from {'the pipeline ' * (conditions['from'] == 'pipeline')}{conditions['path']}"

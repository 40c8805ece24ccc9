"""`dqtool inspect`: what an artifact, an exported directory, a report or a model is. Reads headers only: no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dqtool.artifacts import Manifest, manifest_path, open_artifact
from dqtool.artifacts.jsonvalues import Json, JsonObject
from dqtool.artifacts.reading import MANIFEST_BYTES, load_json, parse_json, read_file
from dqtool.artifacts.records import ConditionsRecord, InputRecord, LayerRecord, PipelineRecord
from dqtool.core.cost import bops, bops_ratio
from dqtool.models.sampling.fitted import FITTED, sentence
from dqtool.models.sources.resolve import ModelSource, resolve_model
from dqtool.report import format_seconds, table_lines
from dqtool.runtimes.attention_times import summary as attention_times

__all__ = ["describe", "render"]


@dataclass(frozen=True)
class DescribedArtifact:
    """An intact artifact: its manifest, bytes on disk, number of tensors, and values of its layers' weights."""

    path: str
    manifest: Manifest
    bytes: int
    sha256: str
    parameters_total: int
    tensors: int | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the manifest with these figures."""
        found = load_json(manifest_path(self.path), MANIFEST_BYTES)
        found |= {"kind": "artifact", "path": self.path, "bytes": self.bytes, "sha256": self.sha256}
        counts = {} if self.tensors is None else {"tensors": self.tensors}
        return found | counts | {"parameters_total": self.parameters_total}


@dataclass(frozen=True)
class DescribedModel:
    """A full-precision model. `layers` are the tensors that can be layers' weights, as (name, shape, dtype)."""

    source: ModelSource
    tensors: int
    parameters_total: int
    dtypes: list[str]
    layers: list[tuple[str, Sequence[int], str]]

    @property
    def pipeline(self) -> str | None:
        """Class of the pipeline; None for a bare component."""
        index = self.source.model_index
        return None if index is None else index.get("_class_name")

    @property
    def bytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(path.stat().st_size for path in self.source.weights)

    def to_json(self) -> dict[str, Json]:
        """Return the description as JSON."""
        return {
            "kind": "model",
            "path": self.source.given,
            "class": self.source.class_name,
            "config": self.source.config,
            "pipeline": self.pipeline,
            "scheduler": self.source.scheduler,
            "sha256": self.source.sha256(),
            "bytes": self.bytes,
            "parameters_total": self.parameters_total,
            "dtypes": self.dtypes,
            "tensors": self.tensors,
            "layers": [{"name": name, "shape": shape, "dtype": dtype} for name, shape, dtype in self.layers],
        }


def describe(given: str) -> DescribedArtifact | DescribedModel:
    """Return all that is known of what is at `given`; an artifact's data is verified.

    Raises:
        EnvironmentFault: nothing is there.
        ArtifactError: it is something else, or damaged.
    """
    if not given.startswith("zoo:") and _has_manifest(given):
        return _describe_artifact(given)
    return _describe_model(resolve_model(given))


def render(description: DescribedArtifact | DescribedModel) -> list[str]:
    """Return the description as lines of text."""
    if isinstance(description, DescribedArtifact):
        return _render_artifact(description)
    return _render_model(description)


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


def _describe_artifact(given: str) -> DescribedArtifact:
    artifact = open_artifact(given)
    manifest = artifact.manifest
    files = [manifest.file] if manifest.file is not None else list((manifest.files or {}).values())
    size = sum(entry.bytes for entry in files) if files else artifact.path.stat().st_size
    weights = [path for path in manifest.files or {} if path.endswith(".safetensors")]
    tensors = None
    if manifest.file is not None:
        tensors = len(artifact.tensor_names())
    elif weights:
        tensors = sum(len(artifact.tensor_names(path)) for path in weights)
    total = sum(prod(layer.shape) for layer in manifest.layers if layer.kind != "attention")
    return DescribedArtifact(given, manifest, size, artifact.sha256, total, tensors)


def _describe_model(source: ModelSource) -> DescribedModel:
    entries = source.tensor_entries()
    return DescribedModel(
        source,
        len(entries),
        sum(prod(entry["shape"]) for entry in entries.values()),
        sorted({entry["dtype"] for entry in entries.values()}),
        [
            (name.removesuffix(".weight"), entry["shape"], entry["dtype"])
            for name, entry in entries.items()
            if name.endswith(".weight") and len(entry["shape"]) > 1
        ],
    )


def _render_model(model: DescribedModel) -> list[str]:
    source = model.source
    lines = _pairs(
        {
            "model": source.given,
            "network": source.class_name,
            "pipeline": model.pipeline or "none (a bare component)",
            "scheduler": (source.scheduler or {}).get("_class_name", "-"),
            "parameters": f"{model.parameters_total:,} in {model.tensors} tensors ({', '.join(model.dtypes)})",
            "bytes": f"{model.bytes:,}",
            "sha256": source.sha256(),
        }
    )
    rows = [(name, _shape(shape), f"{prod(shape):,}") for name, shape, _ in model.layers]
    return [*lines, "", f"Layers ({len(rows)})", *table_lines(["layer", "weight", "parameters"], rows)]


def _render_artifact(found: DescribedArtifact) -> list[str]:
    note = found.manifest
    model = note.model
    lines = _pairs(
        {
            "artifact": f"{found.path}  (intact)",
            "stage": note.stage,
            "made by": f"dqtool {note.version}, torch {note.environment.versions.get('torch', '?')}, "
            f"in {format_seconds(note.seconds)}",
            "inputs": "; ".join(_input(entry) for entry in note.inputs) or "-",
            "network": "?  (from ?)" if model is None else f"{model.class_name}  (from {model.source})",
            "sampling": _sampling(note.pipeline or PipelineRecord()),
            **_correction(note.metrics.as_read),
            "bytes": f"{found.bytes:,}" + ("" if found.tensors is None else f" in {found.tensors} tensors"),
            "sha256": found.sha256,
            "fingerprint": note.fingerprint,
        }
    )
    lines += ["", "Parameters", *_pairs(_flat(note.parameters.as_read))]
    metrics = note.metrics.as_read
    figures = _flat(metrics, skip=_per_layer(metrics, note.layers))
    if figures:
        lines += ["", "Metrics", *_pairs(figures)]
    if note.layers:
        lines += ["", *_layer_lines(note.layers, metrics)]
    return lines


def _layer_lines(layers: Sequence[LayerRecord], metrics: JsonObject) -> list[str]:
    """Return the table of layers, with the columns that this stage knows, and their sums."""
    has_bits = any(layer.bits is not None for layer in layers)
    has_branch = any(layer.low_rank for layer in layers)
    has_runs = any(layer.runs is not None for layer in layers)
    has_scaling = any(layer.scaling is not None for layer in layers)
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
        scaling = layer.scaling
        row: list[object] = [layer.name, layer.kind, _shape(layer.shape), f"{layer.macs:,}"]
        if has_bits:
            row.append(None if layer.bits is None else "/".join(map(str, layer.bits)))
        if has_branch:
            row.append(layer.low_rank or None)
        if has_runs:
            row.append((layer.runs or "").partition(":")[0] or None)
        if has_scaling:
            row += (
                [
                    scaling.method,
                    f"{scaling.unsaturated_share:.1%}",
                    f"{scaling.mean_inverse:.3f}",
                    f"{scaling.max:.2f}",
                    f"groups of {layer.rotation} rotated"
                    if layer.rotation
                    else ", ".join(scaling.folded_into or ["quantizer"]),
                ]
                if scaling
                else [None] * 5
            )
        row += [values.get(layer.name) for values in per_layer.values()]
        rows.append(row)
    weights = [layer for layer in layers if layer.kind != "attention"]
    parameters = sum(prod(layer.shape) for layer in weights)
    macs = sum(layer.macs for layer in layers)
    lines = [f"Layers ({len(layers)}): {parameters:,} weights, {macs:,} MACs per forward pass and sample"]
    if has_bits:
        lines.append(
            f"{bops(layers) / 1e9:.3f} G bit operations, {bops_ratio(layers):.1f}x fewer than float32; {_shares(weights)}"
        )
    if has_branch:
        lines.append(_branches(layers))
    if has_runs:
        lines += _runs(layers)
    if has_scaling:
        lines.append(_whereabouts(layers))
    return [*lines, *table_lines(columns, rows)]


def _runs(layers: Sequence[LayerRecord]) -> list[str]:
    """Return lines with the number of layers and attention products in int8, and the reasons for the others."""
    lines = []
    for what, kinds in (("layers", ("conv2d", "linear")), ("attention products", ("attention",))):
        told = [layer for layer in layers if layer.kind in kinds and layer.runs is not None]
        if told:
            count = sum(layer.runs == "int8" for layer in told)
            lines.append(f"integer runtimes: {count} of {len(told)} {what} in int8")
            lines += attention_times() if what != "layers" else []
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if layer.runs not in (None, "int8"):
            reasons.setdefault(str(layer.runs), []).append(layer.name)
    return lines + [
        f"in {reason}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}" for reason, names in reasons.items()
    ]


def _branches(layers: Iterable[LayerRecord]) -> str:
    """Return a line with the number of low-rank branches and their bytes."""
    found = [layer for layer in layers if layer.low_rank]
    size = sum(2 * layer.low_rank * (layer.shape[0] + prod(layer.shape[1:])) for layer in found)
    return f"low-rank branches in 16 bits: {len(found)} layers, {size:,} bytes"


def _whereabouts(layers: Iterable[LayerRecord]) -> str:
    """Return a line with the number of layers whose factors are folded into producers or applied by input quantizers, and of
    those whose inputs are rotated."""
    scaled = [(layer, layer.scaling) for layer in layers if layer.scaling is not None]
    rotated = sum(bool(layer.rotation) for layer, _ in scaled)
    folded = sum(scaling.folded_into is not None for _, scaling in scaled)
    own = len(scaled) - folded - rotated
    line = f"1/s: folded into producers for {folded} layers, part of the input's quantizer for {own}"
    return line + (f"; inputs of {rotated} layers are rotated" if rotated else "")


def _shares(weights: Iterable[LayerRecord]) -> str:
    """Return the share of weights at each bit-width: `weights at 4/4: 91.3%, 8/8: 8.7%`."""
    counts: dict[str, int] = {}
    for layer in weights:
        key = "float" if layer.bits is None else "/".join(map(str, layer.bits))
        counts[key] = counts.get(key, 0) + prod(layer.shape)
    total = sum(counts.values())
    shares = [f"{key}: {count / total:.1%}" for key, count in sorted(counts.items(), key=lambda item: -item[1])]
    return "weights at " + ", ".join(shares)


def _per_layer(metrics: JsonObject, layers: Iterable[LayerRecord]) -> dict[str, Mapping[str, Json]]:
    """Return the metrics that are one number for each of some layers, by name: columns of the table."""
    names = {layer.name for layer in layers}
    return {
        key: value
        for key, value in metrics.items()
        if isinstance(value, Mapping)
        and value
        and names.issuperset(value)
        and all(isinstance(item, int | float) for item in value.values())
    }


def _flat(values: JsonObject, prefix: str = "", skip: Iterable[str] = ()) -> dict[str, str]:
    """Return nested mappings as `a.b: text`; long lists are counted, not shown."""
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


def _number(value: Json) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _input(entry: InputRecord) -> str:
    return f"{entry.name} ({entry.stage or 'model'}, sha256 {entry.sha256[:12]}…)"


def _sampling(pipeline: PipelineRecord) -> str:
    sampling = pipeline.sampling
    if sampling is None:
        return str((pipeline.scheduler or {}).get("_class_name", "-"))
    said = f"{sampling.scheduler['_class_name']}, {sampling.steps} steps, eta {sampling.eta:g}"
    if sampling.embedded_guidance is not None:
        said += f", embedded guidance {sampling.embedded_guidance:g}"
    return said if sampling.conditions is None else f"{said}, {_origin(sampling.conditions)}"


def _correction(metrics: JsonObject) -> dict[str, str]:
    """Return the line on the sampling that the correction of predictions was fitted with; nothing without one."""
    fitted = metrics.get(FITTED)
    return {"predictions": f"corrected for {sentence(fitted)}"} if isinstance(fitted, Mapping) else {}


def _origin(conditions: ConditionsRecord) -> str:
    """Return `conditions from FILE` or `random conditions`."""
    if conditions.origin == "random":
        return "random conditions"
    return f"conditions from {'the pipeline ' * (conditions.origin == 'pipeline')}{conditions.path}"

"""`dqtool export`: a diffusers directory that holds the quantized network in one of `dqtool.formats`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from dqtool import report
from dqtool.artifacts import CARD, Artifact
from dqtool.artifacts.jsonvalues import ForeignConfig, Json, JsonObject
from dqtool.artifacts.names import path_within
from dqtool.artifacts.records import PipelineRecord
from dqtool.core.bits import bits_label
from dqtool.formats import FORMATS, prepare
from dqtool.formats.card import model_card
from dqtool.formats.shapes import network_shapes, predicted_bytes
from dqtool.models.components.companion_files import check_companion
from dqtool.models.sampling.fitted import FITTED
from dqtool.stages.options.export import ExportOptions
from dqtool.stages.shared.paths import read_paths
from dqtool.stages.shared.running import RunSettings, StageOutput, input_artifact, run_unless_cached

__all__ = ["FORMATS", "ExportOptions", "export"]

CODE_VERSION = 3


def export(options: ExportOptions, settings: RunSettings) -> str:
    """Write the exported directory; returns its path as given."""
    distilled = input_artifact(options.artifact, ["distill"], "distill")
    inputs = [distilled.as_input()]
    run_unless_cached(
        "export",
        CODE_VERSION,
        options.output,
        {"format": options.format},
        inputs,
        settings,
        lambda _key: produce(distilled, options.format),
        kind="directory",
        reads=read_paths(options),
    )
    return options.output


def produce(distilled: Artifact, format_name: str) -> StageOutput:
    """Collect what the directory holds and predict its size."""
    from dqtool.core.cost import bops, float_bops
    from dqtool.models.components.companions import in_float32
    from dqtool.models.families import family_of

    exported = prepare(format_name, distilled)
    manifest = distilled.manifest
    family = family_of(manifest.network.class_name, distilled.given)
    float_bytes = predicted_bytes(network_shapes(family, manifest.network.config, manifest.layers))
    quantized, full = bops(exported.layers), float_bops(manifest.layers)
    metrics: dict[str, Json] = {
        "bytes_predicted": exported.predicted,
        "bytes_float32": float_bytes,
        "bops": quantized,
        "bops_float32": full,
    }
    if exported.predicted is None:
        del metrics["bytes_predicted"]
    keys = ("refine_loss", "activation_range_ratio", "unsaturated_share", FITTED)
    metrics |= {key: value for key, value in manifest.metrics.to_json().items() if key in keys} | exported.notes
    if format_name == "dense":
        metrics.pop(FITTED, None)  # this format holds no correction

    embedded = manifest.network.source.startswith("zoo:")

    def build(directory: Path) -> JsonObject:
        size = write_directory(directory, manifest.pipeline, exported.config, exported.write)
        for name, data in distilled.attachments().items():
            check_companion(name, manifest.pipeline, distilled.given)
            path = path_within(directory, name, distilled.given)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as stream:  # never over a file of the network or another attachment
                stream.write((in_float32(name, data) if embedded else data).numpy().data)
        if not (directory / CARD).exists():  # a companion may have brought its own
            card = model_card(manifest, format_name, bits_label(exported.layers), format_name != "dense")
            (directory / CARD).write_text(card, encoding="utf-8")
        predicted = exported.predicted
        report.say(
            f"export: {size:,} bytes, {float_bytes / size:.2f}x smaller than float32; "
            + (f"predicted {predicted:,} ({predicted / size - 1:+.2%}); " if predicted is not None else "")
            + f"{full / quantized:.1f}x fewer BOPs"
        )
        return {"bytes": size}

    return StageOutput(None, manifest.network, manifest.pipeline, exported.layers, metrics, build)


def write_directory(
    directory: Path,
    pipeline: PipelineRecord | None,
    config: ForeignConfig,
    write: Callable[[Path], object],
) -> int:
    """Write a diffusers pipeline (or bare component) directory; return the bytes that `write` put there for the network."""
    from dqtool.models.components.export_layout import component_prefix

    component = directory / component_prefix(pipeline)
    component.mkdir(parents=True, exist_ok=True)
    write(component)
    size = sum(path.stat().st_size for path in component.rglob("*") if path.is_file())
    _write_json(component / "config.json", config)
    if pipeline is not None and pipeline.model_index is not None:
        _write_json(directory / "model_index.json", pipeline.model_index)
        (directory / "scheduler").mkdir()
        _write_json(directory / "scheduler" / "scheduler_config.json", pipeline.scheduler or {})
    return size


def _write_json(path: Path, value: ForeignConfig) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

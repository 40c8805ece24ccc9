"""`dqtool export`: a diffusers directory that holds the packed model (`dq`) or its dequantized weights (`dense`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.errors import UsageError
from dqtool.stages.running import Common, Product, execute, input_artifact

if TYPE_CHECKING:
    from torch import Tensor

    from dqtool.models.families import Family

Shapes = dict[str, tuple[tuple[int, ...], str]]

__all__ = ["FORMATS", "ExportOptions", "export"]

CODE_VERSION = 1
FORMATS = ("dq", "dense")


@dataclass(frozen=True)
class ExportOptions:
    """Options of `dqtool export`."""

    artifact: str | None = None
    output: str = "exported"
    format: str = "dq"

    def __post_init__(self) -> None:
        """Raise `UsageError` for an unknown format."""
        if self.format not in FORMATS:
            raise UsageError(
                f"unknown format '{self.format}'", where="--format", fix=f"Choose from {', '.join(FORMATS)}"
            )


def export(options: ExportOptions, common: Common) -> str:
    """Write the exported directory; returns its path as given."""
    distilled = input_artifact(options.artifact, ["distill"], "distill")
    inputs = [{"name": distilled.given, "sha256": distilled.sha256, "stage": distilled.stage}]
    execute(
        "export",
        CODE_VERSION,
        options.output,
        {"format": options.format},
        inputs,
        common,
        lambda _key: produce(distilled, options.format),
        kind="directory",
    )
    return options.output


def produce(distilled: Artifact, format_name: str) -> Product:
    """Collect what the directory holds and predict its size."""
    from dqtool.core.cost import bops, file_bytes
    from dqtool.models.families import family_of
    from dqtool.models.hub import quantization_config
    from dqtool.models.packed import plan_records, plans_of
    from dqtool.nn.surgery import state_shapes

    manifest = distilled.manifest
    tensors = distilled.tensors()
    config = dict(manifest.model["config"])
    float_shapes = network_shapes(family_of(manifest.model["class"], distilled.given), config)
    float_bytes = file_bytes(swapped(float_shapes))
    predicted = file_bytes(swapped(state_shapes(float_shapes, plans_of(manifest), len(tensors["timesteps"]))))
    if format_name == "dense":
        state: Mapping[str, Tensor] = dense_state(distilled)
        predicted = float_bytes
    else:
        state = tensors
        config["quantization_config"] = quantization_config(plan_records(manifest.layers), len(tensors["timesteps"]))
    float_layers = [{**layer, "bits": [32, 32]} for layer in manifest.layers]
    layers = manifest.layers if format_name == "dq" else float_layers
    quantized, full = bops(layers), bops(float_layers)
    metrics = {
        "bytes_predicted": predicted,
        "bytes_float32": float_bytes,
        "bops": quantized,
        "bops_float32": full,
    }
    keys = ("refine_loss", "activation_range_ratio", "unsaturated_share")
    metrics |= {key: manifest.metrics[key] for key in keys if key in manifest.metrics}

    def build(directory: Path) -> None:
        weights = write_directory(directory, manifest.pipeline, config, state)
        metrics["bytes"] = weights.stat().st_size
        report.say(
            f"export: {metrics['bytes']:,} bytes, {float_bytes / metrics['bytes']:.2f}x smaller than float32; "
            f"predicted {predicted:,} ({predicted / metrics['bytes'] - 1:+.2%}); {full / quantized:.1f}x fewer BOPs"
        )

    return Product(None, manifest.model, manifest.pipeline, layers, metrics, build)


def write_directory(
    directory: Path, pipeline: Mapping[str, Any] | None, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> Path:
    """A diffusers pipeline (or bare component) directory; returns the path of the weights."""
    from dqtool.artifacts.tensorfile import save_tensors
    from dqtool.models.export_layout import component_prefix, weights_file

    weights = directory / weights_file(pipeline)
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(weights, state)
    _write_json(directory / component_prefix(pipeline) / "config.json", config)
    if pipeline is not None and "model_index" in pipeline:
        _write_json(directory / "model_index.json", pipeline["model_index"])
        (directory / "scheduler").mkdir()
        _write_json(directory / "scheduler" / "scheduler_config.json", pipeline["scheduler"])
    return weights


def dense_state(distilled: Artifact) -> dict[str, Tensor]:
    """The float network's state with every quantized weight dequantized and its dilation undone: weights keep their
    4-bit values, activations are no longer quantized."""
    from dqtool.core.dilation import spread
    from dqtool.models.packed import packed_network, plans_of
    from dqtool.nn.surgery import quant_layers

    manifest, tensors = distilled.manifest, distilled.tensors()
    network = packed_network(manifest.model["class"], manifest.model["config"], plans_of(manifest), tensors)
    layers = quant_layers(network)
    owned = {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict()}
    tables = {f"{plan.info.name}." for plan in plans_of(manifest) if plan.info.kind == "attention"}
    state = {
        name: value
        for name, value in tensors.items()
        if name not in owned
        and name != "timesteps"
        and not (name.endswith(("_scale", "_zero_point")) and name.startswith(tuple(tables)))
    }
    for name, layer in layers.items():
        weight = layer.quantized_weight()
        if layer.dilation is not None:
            weight = weight / spread(layer.dilation, weight, layer.groups)
        state[f"{name}.weight"] = weight
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def network_shapes(family: Family, config: Mapping[str, Any]) -> Shapes:
    """Shape and dtype of every tensor of the float32 network."""
    import torch

    with torch.device("meta"):
        network = family.build(config)
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in network.state_dict().items()}


def swapped(shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As the cost model wants it: (dtype, shape)."""
    return {name: (dtype, shape) for name, (shape, dtype) in shapes.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

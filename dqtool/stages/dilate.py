"""`dqtool dilate`: Weight Dilation (or another scaling) of a full-precision model. Needs weights only."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Artifact, open_artifact
from dqtool.errors import NumericError, UsageError
from dqtool.models.sources import ModelSource, resolve_model
from dqtool.stages.running import Common, Product, execute

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.models.families import Family
    from dqtool.nn.trace import LayerInfo

__all__ = ["DilateOptions", "dilate"]

CODE_VERSION = 1
TOLERANCE = 1e-5
"""Largest allowed |dilated - original| relative to the output's largest magnitude: float32 round-off."""


@dataclass(frozen=True)
class DilateOptions:
    """Options of `dqtool dilate`."""

    model: str
    output: str = "dilated.safetensors"
    config: str | None = None
    scaling: str = "wd"
    stats: str | None = None
    cap: float = 64.0


def dilate(options: DilateOptions, common: Common) -> str:
    """Scale the model's in-channels and write the dilated artifact; returns its path as given.

    Raises:
        UsageError: an unknown scaling, or one that needs `stats`.
        NumericError: the dilated network's output differs from the original's by more than round-off.
    """
    source = resolve_model(options.model, options.config)
    stats = None if options.stats is None else open_artifact(options.stats, ["calibrate"])
    inputs: list[dict[str, Any]] = [{"name": source.given, "sha256": source.sha256(), "stage": None}]
    if stats is not None:
        inputs.append({"name": stats.given, "sha256": stats.sha256, "stage": stats.stage})
    parameters = {"scaling": options.scaling, "cap": options.cap}
    execute(
        "dilate",
        CODE_VERSION,
        options.output,
        parameters,
        inputs,
        common,
        lambda _key: produce(source, stats, options),
        reads=source.weights,
    )
    return options.output


def produce(source: ModelSource, stats: Artifact | None, options: DilateOptions) -> Product:
    """Load, scale, prove the equivalence."""
    import torch

    from dqtool.core.scaling import scaling_method
    from dqtool.models.families import family_of
    from dqtool.models.loading import build_network, load_weights
    from dqtool.nn.trace import trace

    family = family_of(source.class_name, str(source.config_path))
    state = load_weights(source)
    network = build_network(source.class_name, source.config, state, source.given)
    traced = trace(network, family.example(source.config), block_classes=family.block_classes)
    _refuse_untraced(network, traced.layers)
    method = scaling_method(options.scaling)
    scales = _scales(traced.layers, state, stats, options)
    tensors: dict[str, Tensor] = dict(state)
    records = []
    for info in traced.layers:
        scale = scales.get(info.name)
        record = asdict(info)
        if scale is not None:
            name = f"{info.name}.weight"
            tensors[name] = method.apply(state[name], scale, info.groups)
            tensors[f"{info.name}.dilation"] = scale
            unsaturated = scale > 1
            record["scaling"] = {
                "method": options.scaling,
                "unsaturated_share": float(unsaturated.float().mean()),
                "mean": float(scale.mean()),
                "max": float(scale.max()),
                "mean_inverse": float((1 / scale).mean()),
            }
        records.append(record)
    error = equivalence_error(network, tensors, scales, family, source.config)
    if not error <= TOLERANCE:
        raise NumericError(
            f"The dilated network's output differs from the original's by {error:.2g} relative, more than {TOLERANCE:g}",
            where=source.given,
            fix="A layer's input range may exceed what float32 resolves; lower --cap",
        )
    pipeline = None
    if source.pipeline is not None:
        pipeline = {"model_index": source.model_index, "component": source.component, "scheduler": source.scheduler}
    model = {
        "class": source.class_name,
        "config": source.config,
        "family": family.name,
        "source": source.given,
        "source_config": options.config,
        "source_sha256": source.sha256(),
        "parameters": sum(t.numel() for t in state.values()),
    }
    every = torch.cat(list(scales.values())) if scales else torch.ones(1)
    metrics = {
        "equivalence_error": error,
        "unsaturated_share": float((every > 1).float().mean()),
        "mean_dilation": float(every.mean()),
        "mean_inverse": float((1 / every).mean()),
        "blocks": [{"name": block.name, "reads": sorted(block.reads)} for block in traced.blocks],
        "output_reads": sorted(traced.output_reads),
    }
    _tell(records, metrics)
    return Product(tensors, model, pipeline, records, metrics)


def equivalence_error(
    network: nn.Module,
    dilated: dict[str, Tensor],
    scales: dict[str, Tensor],
    family: Family,
    config: dict[str, Any],
) -> float:
    """Largest |y' - y| over the output's largest magnitude, on random inputs at random steps; `network` is left as it was.

    y' runs the dilated weights on `x / s`.
    """
    import torch

    from dqtool.nn.scaled import scaled_inputs

    arguments = family.example(config, batch=2)
    with torch.no_grad():
        original = network(**arguments, return_dict=False)[0]
        layers = {name: network.get_submodule(name) for name in scales}
        weights = {name: layer.weight for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                layer.weight = torch.nn.Parameter(dilated[f"{name}.weight"], requires_grad=False)
            with scaled_inputs(network, scales):
                changed = network(**arguments, return_dict=False)[0]
        finally:
            for name, layer in layers.items():
                layer.weight = weights[name]
    return float((changed - original).abs().max() / original.abs().max().clamp(min=torch.finfo(torch.float32).tiny))


def _scales(
    layers: list[LayerInfo], state: dict[str, Tensor], stats: Artifact | None, options: DilateOptions
) -> dict[str, Tensor]:
    """The factors of every layer; layers that share an input share them. Layers that nothing moves have no entry."""
    from dqtool.core.scaling import ScalingInput, scaling_method

    method = scaling_method(options.scaling)
    if method.needs_statistics and stats is None:
        raise UsageError(
            f"--scaling {options.scaling} looks at activations",
            where="--stats",
            fix="Name a calibrated artifact of this model: dilate with `none`, calibrate, then give it as --stats",
        )
    statistics = {} if stats is None else stats.tensors()
    scales: dict[str, Tensor] = {}
    groups: dict[str, list[LayerInfo]] = {}
    for info in layers:
        if info.kind != "attention":
            groups.setdefault(info.shares or info.name, []).append(info)
    for owner, members in groups.items():
        lo = hi = None
        if f"{owner}.channel_range" in statistics:
            lo, hi = statistics[f"{owner}.channel_range"]
        weights = [state[f"{member.name}.weight"] for member in members]
        scale = method(ScalingInput(weights, members[0].groups, lo, hi, options.cap)).scale
        if bool((scale != 1).any()):
            scales.update({member.name: scale.clone() for member in members})
    return scales


def _refuse_untraced(network: nn.Module, layers: list[LayerInfo]) -> None:
    from dqtool.nn.trace import is_quantizable

    seen = {info.name for info in layers}
    silent = [name for name, module in network.named_modules() if is_quantizable(module) and name not in seen]
    if silent:
        report.warn(f"{len(silent)} layers never run in a forward pass and stay float, first {silent[0]}")


def _tell(records: list[dict[str, Any]], metrics: dict[str, Any]) -> None:
    rows = [
        (
            record["name"],
            "x".join(map(str, record["shape"])),
            f"{record['scaling']['unsaturated_share']:.1%}",
            f"{record['scaling']['mean_inverse']:.3f}",
            f"{record['scaling']['max']:.2f}",
        )
        for record in records
        if "scaling" in record
    ]
    report.table("Weight dilation", ["layer", "weight", "unsaturated", "mean 1/s", "max s"], rows)
    report.say(
        f"output unchanged to {metrics['equivalence_error']:.1e} relative; {metrics['unsaturated_share']:.1%} of "
        f"in-channels dilated, mean 1/s {metrics['mean_inverse']:.3f}"
    )

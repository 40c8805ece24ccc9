"""Export of a published architecture with random weights.

It serves to measure speed, load time and memory without a checkpoint, none of which depends on the values of weights.
Weight grids span minimum to maximum, and activation tables come from one random input at two timesteps. Everything else
(roles, bits, dilation, packing, manifest) is as in an export that was calibrated and distilled.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dqtool import report
from dqtool.artifacts import Manifest, cache_directory, commit_directory, environment, fingerprint, is_current, lock
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.records import ModelRecord, ParametersRecord, PipelineRecord, SamplingRecord
from dqtool.artifacts.schema import unchecked
from dqtool.core.quantization import QuantizationSpec
from dqtool.models.architectures import Architecture, architecture

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dqtool.graph.trace import LayerInfo
    from dqtool.models.families import Family
    from dqtool.nn.assignment import LayerPlan

__all__ = ["random_export"]

CODE_VERSION = 1
OBSERVED = 2
"""Timesteps at which ranges are observed. The other rows of a table repeat the nearest of them."""


def random_export(arch: str, spec: QuantizationSpec, force: bool = False) -> str:
    """Return the exported directory of an architecture at these bits.

    It is made on first use, under `$DQTOOL_CACHE` (default `~/.cache/dqtool`).

    Raises:
        UsageError: no such architecture.
        EnvironmentFault: the cache can't be written.
    """
    wanted = architecture(arch)
    bits = str(spec.bits)
    parameters: JsonObject = {"arch": arch, "bits": bits, "config": wanted.network_config(), "format": "dq"}
    key = fingerprint("export", CODE_VERSION, parameters, [])
    folder = cache_directory("bench")
    path = folder / f"{arch}-w{bits.replace('/', 'a')}"
    if not force and is_current(path, key):
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(path):
        if force or not is_current(path, key):
            _make(path, wanted, spec, parameters, key)
    return str(path)


def _make(path: Path, wanted: Architecture, spec: QuantizationSpec, parameters: JsonObject, key: str) -> None:
    from dqtool.artifacts.tensorfile import save_tensors
    from dqtool.models.components.export_layout import WEIGHTS
    from dqtool.models.families import family_of
    from dqtool.models.hub.quantizer import quantization_config
    from dqtool.models.networks.packed import plan_records, planned_record
    from dqtool.nn.assignment import assign_bits
    from dqtool.nn.surgery import packed_state

    family = family_of(wanted.class_name, f"architecture {wanted.name}")
    with report.progress(f"bench: random {wanted.name}", 4) as progress:
        network, infos, dilation, count = _network(family, wanted)
        progress.advance(note="weights")
        plans = assign_bits(infos, spec, dilated=dilation.keys())
        tables = _tables(network, family, wanted, plans, dilation)
        progress.advance(note="ranges")
        _quantize(network, plans, timesteps_of(wanted), dilation, tables)
        state = packed_state(network)
        progress.advance(note="packing")
        del network
        records = [planned_record(plan) for plan in plans]
        config = wanted.network_config()
        ours = quantization_config(plan_records(records), len(state["timesteps"]), static=False)
        packed = {**config, "quantization_config": ours}

        def build(directory: Path) -> None:
            import json

            save_tensors(directory / WEIGHTS, state)
            (directory / "config.json").write_text(json.dumps(packed, indent=2, sort_keys=True) + "\n")

        manifest = Manifest(
            stage="export",
            fingerprint=key,
            model=ModelRecord(wanted.class_name, config, family.name, wanted.name, parameters=count),
            pipeline=PipelineRecord(sampling=SamplingRecord(wanted.scheduler, wanted.steps, wanted.eta)),
            parameters=unchecked(parameters, ParametersRecord),
            layers=records,
            environment=environment(),
        )
        commit_directory(path, build, manifest)
        progress.advance(note="files")


def _network(family: Family, wanted: Architecture) -> tuple[nn.Module, list[LayerInfo], dict[str, Tensor], int]:
    """Return (random network with dilated weights, its layers, dilation by layer, number of weights)."""
    import torch

    from dqtool.graph.tied_modules import tie_modules
    from dqtool.scaling.methods import ScalingInput, scaling_method

    config = wanted.network_config()
    with torch.device("meta"):
        ghost = family.build(config)
        copies = tuple(f"{copy}." for copy, _ in family.tied_modules(config))
        names = [name for name in ghost.state_dict() if not name.startswith(copies)] if copies else []
        tie_modules(ghost, names, family.tied_modules(config))
    infos = family.graph(ghost, config).trace.layers
    torch.manual_seed(0)
    network = tie_modules(family.build(config), names, family.tied_modules(config)).eval().requires_grad_(False)
    count = sum(t.numel() for t in network.state_dict().values())
    method = scaling_method("wd")
    groups: dict[str, list[LayerInfo]] = {}
    for info in infos:
        if info.kind != "attention":
            groups.setdefault(info.shares or info.name, []).append(info)
    dilation: dict[str, Tensor] = {}
    for members in groups.values():
        layers = [network.get_submodule(info.name) for info in members]
        weights: list[Tensor] = [layer.weight.data for layer in layers]  # type: ignore[union-attr,misc]
        scale = method(ScalingInput(weights, members[0].groups, None, None, 64.0)).scale
        if not bool((scale != 1).any()):
            continue
        for info, layer, weight in zip(members, layers, weights, strict=True):
            dilation[info.name] = scale.clone()
            layer.weight.data = method.apply(weight, scale, info.groups)  # type: ignore[union-attr]
    return network, infos, dilation, count


def _tables(
    network: nn.Module, family: Family, wanted: Architecture, plans: list[LayerPlan], dilation: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return activation tables of `wanted.steps` rows, by layer.

    The network runs dilated weights on undivided inputs: its outputs mean nothing, and only plausible ranges are needed.
    """
    import torch

    from dqtool.nn.statistics import collect, initial_tables

    config = wanted.network_config()
    timesteps = timesteps_of(wanted)[:: max(1, wanted.steps // OBSERVED)][:OBSERVED]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *family.sample_shape(config), generator=generator)
    conditions = family.conditions(config, 1, generator)

    def at(timestep: Tensor) -> Any:
        return lambda: family.predict(network, x, timestep, conditions)

    observed = [at(timestep) for timestep in timesteps]
    statistics = collect(network, [plan.info for plan in plans], dilation, observed)
    tables = initial_tables(plans, statistics)
    rows = torch.arange(wanted.steps) * len(timesteps) // wanted.steps
    return {name: (scale[rows], zero_point[rows]) for name, (scale, zero_point) in tables.items()}


def _quantize(
    network: nn.Module,
    plans: list[LayerPlan],
    timesteps: Tensor,
    dilation: dict[str, Tensor],
    tables: dict[str, tuple[Tensor, Tensor]],
) -> None:
    """Insert quantized layers as `distill` does, with weight grids from minimum to maximum."""
    from torch import nn

    from dqtool.core.affine import affine_parameters
    from dqtool.nn.layers import FakeQuantLayer
    from dqtool.nn.surgery import assign_tables, insert_fake, quant_layers

    insert_fake(network, plans, timesteps, dilation)
    assign_tables(network, plans, tables)
    for layer in quant_layers(network).values():
        if isinstance(layer, FakeQuantLayer) and layer.bits.quantizes_weight:
            rows = layer.weight.flatten(1)
            scale, zero = affine_parameters(rows.amin(1), rows.amax(1), layer.bits.weight, symmetric=layer.low == 1)
            layer.weight_scale = nn.Parameter(scale, requires_grad=False)
            layer.weight_zero_point = nn.Parameter(zero, requires_grad=False)


def timesteps_of(wanted: Architecture) -> Tensor:
    """Return the timesteps `[T]` of the architecture's usual sampler."""
    from dqtool.models.families import family_of
    from dqtool.models.sampling.sampler import Sampler, make_sampler

    family = family_of(wanted.class_name, f"architecture {wanted.name}")
    return Sampler(family, make_sampler(wanted.scheduler), wanted.steps, wanted.eta).timesteps()

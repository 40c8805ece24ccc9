"""Export of a published architecture with random codes.

It serves to measure speed, load time and memory without a checkpoint, none of which depends on the values of weights. Codes
are uniform, scales keep activations near their usual size, and tables are plausible ranges: nothing is calibrated. Roles,
bits, dilation, names, packing and manifest are as in an export that was calibrated and distilled.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dqtool import report
from dqtool.artifacts import Manifest, cache_directory, commit_directory, environment, fingerprint, is_current, lock
from dqtool.artifacts.jsonvalues import JsonObject
from dqtool.artifacts.records import ModelRecord, ParametersRecord, PipelineRecord, SamplingRecord
from dqtool.artifacts.schema import unchecked
from dqtool.core.quantization import QuantizationSpec
from dqtool.models.architectures import Architecture, architecture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dqtool.graph.trace import LayerInfo
    from dqtool.models.families import Family
    from dqtool.nn.assignment import LayerPlan

    Shapes = dict[str, tuple[tuple[int, ...], str]]

__all__ = ["random_export"]

CODE_VERSION = 2
REACH = 3.0
"""Largest activation that a table covers, in standard deviations of a unit normal."""


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

    family = family_of(wanted.class_name, f"architecture {wanted.name}")
    with report.progress(f"bench: random {wanted.name}", 3) as progress:
        shapes, infos = _shapes(family, wanted)
        dilated = [info.name for info in infos if info.kind != "attention" and info.role is None]
        plans = assign_bits(infos, spec, dilated=dilated)
        progress.advance(note="layers")
        state = _state(shapes, plans, wanted)
        count = sum(math.prod(shape) for shape, _ in shapes.values())
        progress.advance(note="codes")
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


def _shapes(family: Family, wanted: Architecture) -> tuple[Shapes, list[LayerInfo]]:
    """Return shape and dtype of every tensor of the float network, and its layers."""
    import torch

    from dqtool.graph.tied_modules import tie_modules

    config = wanted.network_config()
    pairs = family.tied_modules(config)
    with torch.device("meta"):
        ghost = family.build(config)
        copies = tuple(f"{copy}." for copy, _ in pairs)
        names = [name for name in ghost.state_dict() if not name.startswith(copies)] if copies else []
        tie_modules(ghost, names, pairs)
    infos = family.graph(ghost, config).trace.layers
    shapes = {n: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in ghost.state_dict().items()}
    return shapes, infos


def _state(shapes: Shapes, plans: list[LayerPlan], wanted: Architecture) -> dict[str, Tensor]:
    """Return the packed tensors, drawn with one seed."""
    import torch

    from dqtool.nn.surgery import state_shapes

    generator = torch.Generator().manual_seed(0)
    by_name = {plan.info.name: plan for plan in plans}
    groups: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for name, (shape, dtype) in state_shapes(shapes, plans, wanted.steps).items():
        layer, _, leaf = name.rpartition(".")
        plan = by_name.get(layer)
        if name == "timesteps":
            state[name] = timesteps_of(wanted)
        elif leaf == "dilation" and plan is not None:  # layers that share an input share it
            key = plan.info.shares or layer
            if key not in groups:
                groups[key] = torch.rand(shape, generator=generator) + 0.5
            state[name] = groups[key].clone()
        elif plan is not None and leaf != "bias" and leaf != "weight":
            state[name] = _coded(leaf, shape, plan, generator)
        elif len(shape) > 1:  # a float weight
            state[name] = torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5
        else:
            state[name] = torch.full(shape, float(leaf == "weight"), dtype=getattr(torch, dtype))
    return state


def _coded(leaf: str, shape: tuple[int, ...], plan: LayerPlan, generator: torch.Generator) -> Tensor:
    """Return one tensor of a quantized layer or attention module."""
    import torch

    from dqtool.core.bits import LayerBits
    from dqtool.core.packing import pack

    info = plan.info
    if leaf == "weight_shape":
        return torch.tensor(info.shape, dtype=torch.int32)
    operand = leaf.removesuffix("_packed").removesuffix("_scale").removesuffix("_zero_point")
    bits = getattr(plan.bits, operand) if isinstance(plan.bits, LayerBits) else plan.bits.of(operand)
    if leaf.endswith("_zero_point"):
        return torch.full(shape, 2 ** (bits - 1), dtype=torch.uint8)
    if operand == "probs":
        return torch.full(shape, 1 / (2**bits - 1))
    if operand != "weight":
        return torch.full(shape, 2 * REACH / 2**bits)
    columns = math.prod(info.shape[1:])
    if leaf == "weight_scale":  # uniform codes then have the standard deviation of PyTorch's own initialisation
        return torch.full(shape, 2 / (2**bits * columns**0.5))
    if 32 % bits == 0 and columns * bits % 32 == 0 and bits < 8:  # every bit of a word belongs to a code
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    codes = torch.randint(int(bits == 8), 2**bits, (shape[0], columns), dtype=torch.uint8, generator=generator)
    return codes.view(torch.int32) if bits == 8 and columns % 4 == 0 else pack(codes, bits)


def timesteps_of(wanted: Architecture) -> Tensor:
    """Return the timesteps `[T]` of the architecture's usual sampler."""
    from dqtool.models.families import family_of
    from dqtool.models.sampling.sampler import Sampler, make_sampler

    family = family_of(wanted.class_name, f"architecture {wanted.name}")
    return Sampler(family, make_sampler(wanted.scheduler), wanted.steps, wanted.eta).timesteps()

"""Packed networks with made-up step tables: every kind of quantizer in seconds, no calibration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import component_directory
from torch import Tensor, nn

from dqtool.core.bits import FLOAT_BITS
from dqtool.core.dilation import broadcast_scale
from dqtool.core.quantization import QuantizationSpec
from dqtool.core.rotation import fitting_sizes, rotate_weight
from dqtool.models.families import FAMILIES, family_of
from dqtool.models.hub.quantizer import quantization_config
from dqtool.models.network_methods import Origin, add_methods
from dqtool.models.networks.loading import load_weights
from dqtool.models.networks.packed import packed_network, plan_records, planned_record
from dqtool.models.sources.resolve import resolve_model
from dqtool.nn.assignment import LayerPlan, assign_bits, with_branches
from dqtool.nn.attention import OPERANDS, has_zero_point
from dqtool.nn.call_lock import one_call_at_a_time
from dqtool.nn.low_rank import attach_low_rank
from dqtool.nn.surgery import assign_tables, initialise_weights, insert_fake, packed_state

__all__ = ["second_step", "small_networks", "synthetic_export", "synthetic_network"]


def synthetic_network(model: str, bits: str, steps: int = 5, low_rank: int = 0, rotated: bool = False) -> nn.Module:
    """Return the packed network of `zoo:NAME` (or any model) at timesteps 0, 50, ...; half of its layers are dilated.

    `rotated` rotates every input that a group fits.
    """
    return _synthetic(model, bits, steps, low_rank, rotated)[0]


def synthetic_export(model: str, bits: str, directory: Path, steps: int = 3) -> None:
    """Write the network of `synthetic_network` as an exported directory."""
    network, plans = _synthetic(model, bits, steps)
    records = [planned_record(plan) for plan in plans]
    add_methods(network, Origin(quantization_config(plan_records(records), steps), None))
    network.save_pretrained(directory)


def _synthetic(
    model: str, bits: str, steps: int, low_rank: int = 0, rotated: bool = False
) -> tuple[Any, list[LayerPlan]]:
    generator = torch.Generator().manual_seed(0)
    source = resolve_model(model)
    family, config = FAMILIES[source.class_name], source.config
    network = family.build(config)
    network.load_state_dict(load_weights(source))
    traced = family.graph(network, config).trace
    layers = {info.name: info for info in traced.layers if info.kind != "attention"}
    for name, info in layers.items() if rotated else ():
        info.rotation = next(fitting_sizes(info.shape[1], info.groups), 0)
        weight = network.get_submodule(name).weight
        weight.data = rotate_weight(weight.data, info.rotation)
    owners = [name for name, info in layers.items() if info.shares is None][::2]
    dilation = {name: 1 + torch.rand(layers[name].shape[1], generator=generator) for name in owners}
    dilation |= {name: dilation[info.shares] for name, info in layers.items() if info.shares in dilation}
    for name, factors in dilation.items():
        weight = network.get_submodule(name).weight
        weight.data *= broadcast_scale(factors, weight, 1)
    plans = with_branches(assign_bits(traced.layers, QuantizationSpec.parse(bits), dilated=dilation), low_rank)
    insert_fake(network, plans, torch.arange(steps) * 50.0, dilation)
    tables = {}
    for plan in plans:
        heads = (plan.info.heads,) if plan.info.kind == "attention" else ()
        for operand in OPERANDS if heads else ("",):
            width = plan.bits.of(operand) if heads else plan.bits.input
            if width >= FLOAT_BITS:
                continue
            scale = (0.5 + torch.rand(steps, *heads, generator=generator)) * 6 / 2**width
            zero_point = torch.randint(0, 2**width, (steps, *heads), generator=generator).float()
            if heads and not has_zero_point(operand, width):
                zero_point = torch.full_like(scale, 0 if operand == "probs" else 128)
            tables[f"{plan.info.name}.{operand}" if heads else plan.info.name] = (scale, zero_point)
    attach_low_rank(network, plans)
    initialise_weights(network)
    assign_tables(network, plans, tables)
    state = {
        name: tensor.clone() for name, tensor in packed_state(network).items()
    }  # tensors of a file share no memory
    return packed_network(source.class_name, config, plans, state), plans


def small_networks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """Return `made(name, form)`: a fresh network of that family at 4/4, "hub" as diffusers loads it or "integer"."""
    from dqtool.runtimes.cpu import convert

    known: dict[str, nn.Module] = {}

    def made(name: str, form: str) -> Any:
        if name not in known:
            path = component_directory(name, tmp_path_factory.mktemp(name) / "model")
            known[name] = synthetic_network(str(path), "4/4", steps=3)
        fresh = copy.deepcopy(known[name])
        return convert(fresh) if form == "integer" else one_call_at_a_time(fresh)

    return made


def second_step(network: Any, **extra: Any) -> Tensor:
    """Return the network's output for its example inputs at its second step."""
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    example = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=2)
    told = {"timestep": network.timesteps[1].expand(2), "return_dict": False}
    with torch.no_grad():
        result: Tensor = network(**example | told | extra)[0]
    return result


def answer_at_second_step(network: Any, batch: int = 2) -> Tensor:
    """Return the network's answer to its family's example at its second step."""
    torch.manual_seed(0)
    hints = {"_context_tokens": 5, "_sample_size": 8}
    example = family_of(type(network).__name__, "test").example(hints | dict(network.config), batch=batch)
    with torch.no_grad():
        result: Tensor = network(**example | {"timestep": network.timesteps[1].expand(batch), "return_dict": False})[0]
    return result


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Return |got - expected| / |expected|."""
    return float((got - expected).norm() / expected.norm())

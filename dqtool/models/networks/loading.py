"""Float diffusers networks, built from files or state dicts; every tensor must be used and none may be missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.artifacts import check_finite
from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.records import ModelRecord
from dqtool.errors import ArtifactError
from dqtool.graph.recording import tensors_in
from dqtool.graph.tied_modules import drop_copies, tie_modules
from dqtool.models.config_schema import bounded_parameters
from dqtool.models.families import Family, family_of
from dqtool.models.sources.original.checkpoint import read_checkpoint
from dqtool.models.sources.resolve import ModelSource

__all__ = ["build_network", "load_weights", "materialise", "network_of"]

MOST_POSITIONS = 1 << 27
"""Largest number of values in all tables that a config describes and no file holds."""


def load_weights(source: ModelSource) -> dict[str, Tensor]:
    """Return all tensors of the network, float ones in float32, with LoRAs added; unchanged tensors are views of the file.

    Raises:
        ArtifactError: a file is truncated, of another format, or contradicts its header.
        NumericError: a weight is NaN or infinite.
    """
    state: dict[str, Tensor] = {}
    if source.layout is not None:
        from dqtool.models.sources.original import convert

        state = convert(source.weights[0], source.layout, source.config, source.variant)
    else:
        for path in source.weights:
            state.update(read_checkpoint(path))
    check_finite(state, source.given)
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    if source.loras:
        from dqtool.models.sources.lora import fuse_loras

        state = fuse_loras(state, source)
    return state


def build_network(
    class_name: str, config: ForeignConfig, state: Mapping[str, Tensor], where: str, *, share: bool = False
) -> nn.Module:
    """Return the float network with exactly these weights, in eval mode.

    With `share` the parameters are the tensors of `state` themselves and must not be written to; otherwise copies.

    Raises:
        ArtifactError: names or shapes don't fit the config, or the class has no family.
    """
    family = family_of(class_name, where)
    state = drop_copies(state, family.tied_modules(config))
    with torch.device("meta"), bounded_parameters(4 * len(state) + 500):
        network = tie_modules(family.build(config), state, family.tied_modules(config))
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    floats = {name for name, t in network.state_dict().items() if t.is_floating_point()}
    for name in expected:
        if name not in state:
            raise ArtifactError(
                f"The weights lack '{name}', which the config calls for",
                where=where,
                fix="Check that config and weights belong together",
            )
        if not state[name].is_floating_point() and name in floats:
            raise ArtifactError(
                f"'{name}' holds {str(state[name].dtype).removeprefix('torch.')}, and full-precision weights are floats",
                where=where,
                fix="Give the full-precision model; dqtool quantizes it itself",
            )
        if tuple(state[name].shape) != expected[name]:
            raise ArtifactError(
                f"'{name}' has shape {list(state[name].shape)}; the config calls for {list(expected[name])}",
                where=where,
                fix="Check that config and weights belong together",
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise ArtifactError(
            f"The weights hold {len(extra)} tensors that the config knows nothing of, first '{extra[0]}'",
            where=where,
            fix="Check that config and weights belong together",
        )
    network.load_state_dict({k: v if share else v.clone() for k, v in state.items()}, assign=True)
    materialise(network, family, config)
    return network.eval().requires_grad_(False)


def network_of(model: ModelRecord) -> tuple[Family, ForeignConfig]:
    """Return the family and the diffusers config of a manifest's `model`.

    Raises:
        ArtifactError: the class has no family, or the config is invalid for it.
    """
    config = dict(model.config)
    return family_of(model.class_name, "manifest, key model.class", config), config


def materialise(network: nn.Module, family: Family, config: ForeignConfig) -> None:
    """Compute the tensors outside the state dict (position tables) that were built on the `meta` device, in place.

    They are buffers, or plain attributes of modules.
    """
    ghosts = {name: b.numel() for name, b in network.named_buffers() if b.is_meta}
    plain = dict(_plain_ghosts(network))
    if not ghosts and not plain:
        return
    ghosts |= {".".join(place): sum(t.numel() for t in tensors_in(value)) for place, value in plain.items()}
    if sum(ghosts.values()) > MOST_POSITIONS:
        raise ArtifactError(
            f"The config describes position tables of {sum(ghosts.values()):,} values, and dqtool makes {MOST_POSITIONS:,}",
            where="model config",
        )
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        real = family.build(config)
    for module, name in plain:
        setattr(network.get_submodule(module), name, getattr(real.get_submodule(module), name))
        ghosts.pop(f"{module}.{name}")
    buffers = dict(real.named_buffers())
    for name in ghosts:
        parent, _, leaf = name.rpartition(".")
        network.get_submodule(parent).register_buffer(leaf, buffers[name], persistent=False)


_MODULE_STATE = ("_parameters", "_buffers", "_modules", "_dqtool_stand_in")


def _plain_ghosts(network: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    """Yield (module, attribute) and value of each attribute that holds tensors on `meta`, buffers and parameters excepted."""
    for name, module in network.named_modules():
        for key, value in vars(module).items():
            if key not in _MODULE_STATE and any(t.is_meta for t in tensors_in(value)):
                yield (name, key), value

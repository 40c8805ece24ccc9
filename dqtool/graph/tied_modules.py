"""Tied modules: copies of one module of a model that its diffusers class builds several times (`Family.tied_modules`).

Copies with equal values are stored once, under the names of the original. A network built from such a state shares one
module among all places. A model whose copies differ keeps all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["drop_copies", "restore_copies", "tie_modules"]

Pairs = Sequence[tuple[str, str]]
"""Pairs (name of a copy, name of its original)."""


def drop_copies(state: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """Return the state without the copies if every copy equals its original, else the whole state."""
    names = _copies(state, pairs)
    if any(original not in state for original in names.values()):
        return dict(state)
    if all(torch.equal(state[copy], state[original]) for copy, original in names.items()):
        return {name: tensor for name, tensor in state.items() if name not in names}
    return dict(state)


def restore_copies(state: Mapping[str, Tensor], pairs: Pairs) -> dict[str, Tensor]:
    """Return the state with the copies restored, for a network that does not share modules."""
    full = dict(state)
    for copy, original in pairs:
        for name in state:
            if name.startswith(original + "."):
                full.setdefault(copy + name.removeprefix(original), state[name])
    return full


def tie_modules(network: nn.Module, names: Collection[str], pairs: Pairs) -> nn.Module:
    """Share the modules that a state with these tensor names holds once, in place; returns the network.

    Afterwards `state_dict` and `load_state_dict` hold the shared tensors once.
    """
    held = {copy for copy, _ in pairs if any(name.startswith(copy + ".") for name in names)}
    shared = [(copy, original) for copy, original in pairs if copy not in held]
    if shared and any(name.startswith(shared[0][1] + ".") for name in names):
        for copy, original in shared:
            parent, _, leaf = copy.rpartition(".")
            setattr(network.get_submodule(parent), leaf, network.get_submodule(original))
        network.register_state_dict_post_hook(partial(_forget, pairs=shared))
        network.register_load_state_dict_pre_hook(partial(_recall, pairs=shared))
    return network


def _copies(names: Collection[str], pairs: Pairs) -> dict[str, str]:
    """Return the tensor name of the original for each tensor name of a copy."""
    found = {}
    originals = dict(pairs)
    for name in names:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            prefix = ".".join(parts[:cut])
            if prefix in originals:
                found[name] = originals[prefix] + name.removeprefix(prefix)
    return found


def _forget(_network: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any, pairs: Pairs) -> None:
    for copy, _ in pairs:
        for name in [name for name in state if name.startswith(f"{prefix}{copy}.")]:
            del state[name]


def _recall(_network: nn.Module, state: dict[str, Any], prefix: str, *_: Any, pairs: Pairs) -> None:
    for copy, original in pairs:
        for name in [name for name in state if name.startswith(f"{prefix}{original}.")]:
            state[prefix + copy + name.removeprefix(prefix + original)] = state[name]

"""Shapes of the float network, which sizes are predicted from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dqtool.models.families import Family

__all__ = ["network_shapes", "swapped"]

Shapes = dict[str, tuple[tuple[int, ...], str]]


def network_shapes(
    family: Family, config: Mapping[str, Any], layers: Iterable[Mapping[str, Any]] | None = None
) -> Shapes:
    """Shape and dtype of every tensor of the float32 network. With a manifest's `layers`, what the model has once and its
    class builds repeatedly is there once."""
    import torch

    from dqtool.graph.tied_modules import tie_modules

    with torch.device("meta"):
        network = family.build(config)
    if layers is not None:
        tie_modules(network, [f"{layer['name']}.weight" for layer in layers], family.tied_modules(config))
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in network.state_dict().items()}


def swapped(shapes: Shapes) -> dict[str, tuple[str, tuple[int, ...]]]:
    """As the cost model wants it: (dtype, shape)."""
    return {name: (dtype, shape) for name, (shape, dtype) in shapes.items()}

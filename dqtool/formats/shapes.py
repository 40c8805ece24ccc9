"""Shapes of the tensors of the float network, from which sizes of files are predicted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.artifacts.records import LayerRecord
from dqtool.core.cost import file_bytes

if TYPE_CHECKING:
    from dqtool.models.families import Family

__all__ = ["network_shapes", "predicted_bytes"]

Shapes = dict[str, tuple[tuple[int, ...], str]]
"""(shape, dtype) of tensors by name."""


def network_shapes(family: Family, config: ForeignConfig, layers: Iterable[LayerRecord] | None = None) -> Shapes:
    """Return shape and dtype of every tensor of the float32 network.

    With the `layers` of a manifest, a module that the model's files hold once counts once, even if the network's class
    builds it several times.
    """
    import torch

    from dqtool.graph.tied_modules import tie_modules

    with torch.device("meta"):
        network = family.build(config)
    if layers is not None:
        tie_modules(network, [f"{layer.name}.weight" for layer in layers], family.tied_modules(config))
    return {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in network.state_dict().items()}


def predicted_bytes(shapes: Shapes) -> int:
    """Return the bytes of a safetensors file with tensors of these shapes and dtypes."""
    return file_bytes({name: (dtype, shape) for name, (shape, dtype) in shapes.items()})

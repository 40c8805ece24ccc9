"""Graph of a network: one recording, made on first use, and the layers, blocks and roles derived from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property, partial
from typing import Any

from torch import nn

from dqtool.graph.recording import Recording, record
from dqtool.graph.roles import Roles, roles_of
from dqtool.graph.trace import Trace, block_names, trace_of

__all__ = ["NetworkGraph"]


class NetworkGraph:
    """The structure of a float network, which may be on `meta`.

    `inputs` are arguments of one forward pass, batch 1; `sample` and `timestep` name the two from which roles are derived.
    `block_classes` are the classes of modules that are trained as one block; every quantizable leaf outside of them is a
    block of its own.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Mapping[str, Any],
        sample: str = "sample",
        timestep: str = "timestep",
        block_classes: Collection[str] = (),
    ) -> None:
        self.network, self.inputs = network, dict(inputs)
        self.sample, self.timestep, self.block_classes = sample, timestep, tuple(block_classes)

    @cached_property
    def recording(self) -> Recording:
        """Recording of all operations of one forward pass."""
        return record(self.network, self.inputs, partial(block_names, block_classes=self.block_classes))

    @cached_property
    def trace(self) -> Trace:
        """Layers and blocks in execution order."""
        return trace_of(self.recording, self.sample)

    @cached_property
    def roles(self) -> Roles:
        """Roles of the layers."""
        return roles_of(self.recording, self.sample, self.timestep)

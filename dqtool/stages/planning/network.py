"""Network of a plan, before anything is written: what `dilate` will record of it, run on shapes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.core.quantization import QuantizationSpec
from dqtool.models.components.companions import Companions, companions_of_source
from dqtool.models.families import Family, family_of
from dqtool.models.sources.resolve import ModelSource
from dqtool.stages.dilate import DilateOptions, describe_network
from dqtool.stages.planning.activations import Activations, activations
from dqtool.stages.planning.forecast import Forecast, forecast

__all__ = ["PlannedNetwork"]


@dataclass(frozen=True)
class PlannedNetwork:
    """Network that the options of `dilate` name: its files, and its class and config as artifacts record them."""

    source: ModelSource
    class_name: str
    config: ForeignConfig

    @classmethod
    def of(cls, options: DilateOptions) -> Self:
        """Return the network that `options` name.

        Raises:
            DqtoolError: what `dilate` raises for a model or for options that don't fit it.
        """
        source = options.source()
        return cls(source, *describe_network(source, options))

    @cached_property
    def family(self) -> Family:
        """Family of the network."""
        return family_of(self.class_name, str(self.source.config_path), self.config)

    @cached_property
    def companions(self) -> Companions | None:
        """Other components of its pipeline."""
        return companions_of_source(self.source)

    @property
    def generic(self) -> bool:
        """Answer to whether the network has no adapter of its own."""
        return self.family.name == "generic"

    @cached_property
    def runs_on_shapes(self) -> bool:
        """Answer to whether the network runs without values. Some classes of the generic family look at theirs.

        Recording such a network would run it on the CPU with random weights, which is too much for a plan.
        """
        if not self.generic:
            return True
        example = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, self.family.example(self.config))
        try:
            with torch.no_grad():
                self._build()(**example)
        except Exception:  # a class without an adapter may raise anything
            return False
        return True

    @cached_property
    def activations(self) -> Activations | None:
        """Memory of the network's activations; None where it does not run on shapes."""
        if not self.runs_on_shapes:
            return None
        network = self._build()
        blocks = [block.name for block in self.family.graph(network, self.config).trace.blocks]
        try:
            return activations(network, blocks, self.family.example(self.config))
        except Exception:  # a block without an adapter may not run alone
            if not self.generic:
                raise
            return None

    def forecast(
        self, spec: QuantizationSpec, steps: int, *, corrected: bool = False, low_rank: int = 0
    ) -> Forecast | None:
        """Return counts of the quantized network, see `forecast`; None where it does not run on shapes."""
        if not self.runs_on_shapes:
            return None
        return forecast(self.class_name, self.config, spec, steps, corrected=corrected, low_rank=low_rank)

    def calls_per_step(self, guidance: float | None) -> int:
        """Return how many samples a step gives the network for each image: two where it is guided."""
        plain = guidance in (None, 1) if self.generic else self.class_name == "UNet2DModel"
        return 1 if plain else 2

    def _build(self) -> nn.Module:
        with torch.device("meta"):
            return self.family.build(self.config)

"""Any other diffusers network (`--family generic`): its Conv2d and Linear leaves are the blocks.

The arguments of the forward are read from its signature. Those other than the sample and the timestep come from an example,
`dqtool dilate --example FILE`; see `examples.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.core.device import to_device_of
from dqtool.errors import ArtifactError
from dqtool.models.config_schema import diffusers_class
from dqtool.models.families.base import Family, square_sample
from dqtool.models.families.examples import ARGUMENTS, EXAMPLE, call_arguments, draw_example, read_example
from dqtool.models.sampling.network_time import TIME, NetworkTime
from dqtool.nn.prediction import SAMPLE_NAMES, prediction_of
from dqtool.nn.steps import TIMESTEP_NAMES

__all__ = ["EXAMPLE", "PREFIX", "Generic"]

PREFIX = "generic:"
"""Prefix of the class name in an artifact's manifest."""


class Generic(Family):
    """A network without an adapter of its own; `config` is its config, where that is known already."""

    name = "generic"
    block_classes = ("Attention",)  # quantized attention runs its projections as one block

    def __init__(self, class_name: str, config: Mapping[str, Any] | None = None) -> None:
        self.class_name = class_name
        cls = diffusers_class(class_name, "ModelMixin", "model config, key _class_name")
        self.parameters = inspect.signature(cls.forward).parameters
        self.structure: Mapping[str, Any] = (config or {}).get(ARGUMENTS, {})
        samples = [name for name in SAMPLE_NAMES if name in self.parameters]
        times = [name for name in TIMESTEP_NAMES if name in self.parameters]
        if not samples or not times:
            raise ArtifactError(
                f"{class_name}.forward takes no sample and timestep",
                where="--family generic",
                fix=f"A denoising network is needed: forward({SAMPLE_NAMES[0]} or {SAMPLE_NAMES[1]}, timestep, ...)",
            )
        self.sample, self.timestep = samples[0], times[0]
        empty = inspect.Parameter.empty
        self.required = [
            name
            for name, p in self.parameters.items()
            if p.default is empty
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            and name not in ("self", self.sample, self.timestep)
        ]

    def record_example(self, path: str) -> ForeignConfig:
        """Return the config entries of the example in `path`, see `read_example`."""
        return read_example(path, self.parameters)

    def sample_shape(self, config: ForeignConfig) -> tuple[int, ...]:
        """Return the shape of the example's sample, else `(C, H, W)` from `in_channels` and `sample_size`."""
        example = config.get(EXAMPLE, {})
        return tuple(example[self.sample]["shape"]) if self.sample in example else square_sample(config)

    def tokens(self, config: ForeignConfig) -> int:
        """Return the number of tokens of a sample: patches of its last two dimensions in each frame.

        A sequence `(tokens, width)` has the size of its first dimension, and a vector one token.
        """
        shape = self.sample_shape(config)
        if len(shape) < 3:
            return shape[0] if len(shape) == 2 else 1
        patch = config.get("patch_size") or 1
        sides = [int(side) for side in patch][-2:] if isinstance(patch, list | tuple) else [int(patch)] * 2
        frames = 1 if len(shape) == 3 else prod(shape[:-2]) // int(config.get("in_channels") or 1)
        return max(1, frames) * (shape[-2] // sides[0]) * (shape[-1] // sides[-1])

    def time(self, config: ForeignConfig) -> NetworkTime:
        """Return the conversion that `dilate` recorded; without a record the network receives the scheduler's timestep."""
        return NetworkTime(**config.get(TIME, {}))

    def conditions(self, config: ForeignConfig, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random tensors shaped like the example's; masks, sizes and positions have the example's values.

        Raises:
            ArtifactError: the network requires an argument that the example lacks.
        """
        example = {k: v for k, v in config.get(EXAMPLE, {}).items() if k not in (self.sample, self.timestep)}
        given = {*example, *config.get(ARGUMENTS, {})}
        missing = [name for name in self.required if name not in given]
        if missing:
            raise ArtifactError(
                f"{self.class_name} also needs {', '.join(missing)}",
                where="--family generic",
                fix="Give `dqtool dilate` an --example FILE.safetensors with one tensor an argument, [1, ...], and what is "
                "no tensor in FILE.json beside it",
            )
        return draw_example(example, batch, generator)

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward, with the timestep as `[N]`, which every network takes."""
        return self._arguments(x, timestep, conditions, self.structure)

    def example(self, config: Mapping[str, Any], batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Return the arguments of one forward, see `Family.example`."""
        return Generic(self.class_name, config)._example(config, batch, seed)

    def predict(self, model: nn.Module, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the network's prediction, see `Family.predict`."""
        structure = model.config.get(ARGUMENTS, {})  # type: ignore[union-attr, operator]
        arguments = to_device_of(model, self._arguments(x, timestep, conditions, structure))
        return prediction_of(model(**arguments, return_dict=False))

    def _example(self, config: Mapping[str, Any], batch: int, seed: int) -> dict[str, Any]:
        return super().example(config, batch, seed)

    def _arguments(
        self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor], structure: Mapping[str, Any]
    ) -> dict[str, Any]:
        time = torch.as_tensor(timestep).reshape(-1).expand(len(x))
        return {self.timestep: time, **call_arguments(structure, {self.sample: x, **conditions}, len(x))}

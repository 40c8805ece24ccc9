"""Any other diffusers network (`--family generic`): its Conv2d and Linear leaves are the blocks.

The arguments of the forward are read from its signature. Required ones other than the sample and the timestep come from an
example, `dqtool dilate --example FILE.safetensors`, with one tensor `[N, ...]` per argument. The config keeps their shapes
and dtypes under `_example`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dqtool.artifacts import read_header
from dqtool.artifacts.tensorfile import load_tensors
from dqtool.errors import ArtifactError
from dqtool.models.config_schema import diffusers_class
from dqtool.models.families.base import Family, square_sample
from dqtool.models.sampling.network_time import TIME, NetworkTime
from dqtool.nn.prediction import SAMPLE_NAMES

__all__ = ["EXAMPLE", "PREFIX", "Generic", "example_shapes"]

PREFIX = "generic:"
"""Prefix of the class name in an artifact's manifest."""

EXAMPLE = "_example"
"""Config key of the further arguments: shape, dtype and (for integers) largest value of one sample, by name."""

TIMES = ("timestep", "timesteps", "t")


def example_shapes(path: str) -> dict[str, dict[str, Any]]:
    """Return the config's record of an example: shape and dtype of one sample of each tensor, and the largest integer.

    Raises:
        EnvironmentFault: the file can't be read.
        ArtifactError: the file is no safetensors file, or a tensor has no batch dimension.
    """
    read_header(Path(path))
    shapes: dict[str, dict[str, Any]] = {}
    for name, tensor in sorted(load_tensors(Path(path)).items()):
        if tensor.dim() == 0:
            raise ArtifactError(f"'{name}' has no batch dimension", where=path, fix="Give tensors [1, ...]")
        shapes[name] = {"shape": list(tensor.shape[1:]), "dtype": str(tensor.dtype).removeprefix("torch.")}
        if not tensor.is_floating_point():
            shapes[name]["largest"] = int(tensor.max())
    return shapes


class Generic(Family):
    """A network without an adapter of its own."""

    name = "generic"
    block_classes = ("Attention",)  # quantized attention runs its projections as one block

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        cls = diffusers_class(class_name, "ModelMixin", "model config, key _class_name")
        parameters = inspect.signature(cls.forward).parameters
        found = [name for name in SAMPLE_NAMES if name in parameters]
        if not found or "timestep" not in parameters:
            raise ArtifactError(
                f"{class_name}.forward takes no sample and timestep",
                where="--family generic",
                fix=f"A denoising network is needed: forward({SAMPLE_NAMES[0]} or {SAMPLE_NAMES[1]}, timestep, ...)",
            )
        self.sample = found[0]
        empty = inspect.Parameter.empty
        self.required = [
            name
            for name, p in parameters.items()
            if p.default is empty
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
            and name not in ("self", self.sample, "timestep")
        ]

    def sample_shape(self, config: Mapping[str, Any]) -> tuple[int, ...]:
        """Return the shape of the example's sample, else `(C, H, W)` from `in_channels` and `sample_size`."""
        example = config.get(EXAMPLE, {})
        return tuple(example[self.sample]["shape"]) if self.sample in example else square_sample(config)

    def tokens(self, config: Mapping[str, Any]) -> int:
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

    def time(self, config: Mapping[str, Any]) -> NetworkTime:
        """Return the conversion that `dilate` recorded; without a record the network receives the scheduler's timestep."""
        return NetworkTime(**config.get(TIME, {}))

    def conditions(self, config: Mapping[str, Any], batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Return random tensors shaped like the example's.

        Raises:
            ArtifactError: the network requires an argument that the example lacks.
        """
        example = {k: v for k, v in config.get(EXAMPLE, {}).items() if k not in (self.sample, "timestep")}
        missing = [name for name in self.required if name not in example]
        if missing:
            raise ArtifactError(
                f"{self.class_name} also needs {', '.join(missing)}",
                where="--family generic",
                fix="Give `dqtool dilate` an --example FILE.safetensors with one tensor an argument, [1, ...]",
            )
        given = {}
        for name, entry in example.items():
            shape, dtype = (batch, *entry["shape"]), getattr(torch, entry["dtype"])
            if dtype.is_floating_point:
                given[name] = torch.randn(shape, generator=generator).to(dtype)
            else:
                given[name] = torch.randint(0, int(entry.get("largest", 0)) + 1, shape, generator=generator).to(dtype)
        return given

    def arguments(self, x: Tensor, timestep: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the forward, with the timestep as `[N]`, which every network takes."""
        return {self.sample: x, "timestep": torch.as_tensor(timestep).reshape(-1).expand(len(x)), **conditions}

"""Subject of a benchmark: an exported network, its inputs, and the folder with the files of other contenders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dqtool.artifacts.jsonvalues import ForeignConfig

__all__ = ["Arguments", "Subject"]

Arguments = dict[str, Any]
"""Keyword arguments of one forward pass."""

STEPS = 4
"""Different timesteps among the inputs, so that the timing shows if a runtime recompiles when the step changes."""


@dataclass(frozen=True)
class Subject:
    """An exported network to measure, described by plain values that can be sent to another process.

    Attributes:
        directory: the exported directory.
        class_name: class of the network, as artifacts record it.
        config: config of the network.
        timesteps: timesteps of the export's tables.
        workspace: a folder for the files that other contenders are loaded from.
        threads: threads to compute with.
        reference: the float model; None stands for the exported weights, dequantized.
    """

    directory: str
    class_name: str
    config: ForeignConfig
    timesteps: list[float]
    workspace: str
    threads: int
    reference: str | None = None

    @property
    def diffusers_class(self) -> str:
        """Name of the network's class in diffusers, before which artifacts of the generic family record a prefix."""
        from dqtool.models.families.generic import PREFIX

        return self.class_name.removeprefix(PREFIX)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; `Subject(**value)` restores the subject."""
        return asdict(self)

    @property
    def float_directory(self) -> Path:
        """Path of the float network, a diffusers component directory in float32."""
        return Path(self.workspace) / "float"

    def inputs(self, batch: int) -> list[Arguments]:
        """Return arguments of forward passes that differ in the timestep alone, a scalar as samplers pass it."""
        import torch

        from dqtool.models.families import family_of

        family = family_of(self.class_name, self.directory, self.config)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *family.sample_shape(self.config), generator=generator)
        conditions = family.conditions(self.config, batch, generator)
        stride = max(1, len(self.timesteps) // STEPS)
        chosen = self.timesteps[::stride][:STEPS]
        whole = all(
            float(t).is_integer() for t in chosen
        )  # one type for all, because torch.compile compiles for each type
        return [family.arguments(x, torch.tensor(int(t) if whole else float(t)), conditions) for t in chosen]

    @staticmethod
    def cast(arguments: Mapping[str, Any], dtype: Any, channels_last: bool = False) -> Arguments:
        """Return the arguments with floating tensors (except the timestep) in `dtype`, and images in channels_last if set."""
        import torch
        from torch.utils._pytree import tree_map

        def convert(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            layout = torch.channels_last if channels_last and value.dim() == 4 else torch.preserve_format
            return value.to(dtype=dtype, memory_format=layout)

        return {key: value if key == "timestep" else tree_map(convert, value) for key, value in arguments.items()}

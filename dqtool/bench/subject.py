"""What is measured: one exported network, the inputs it is given, and where its competitors' files are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Arguments", "Subject"]

Arguments = dict[str, Any]
"""Keyword arguments of one forward pass."""

STEPS = 4
"""Different timesteps among the inputs: a runtime that recompiles or reallocates when the step changes must show it."""


@dataclass(frozen=True)
class Subject:
    """Plain values, so that a fresh process can be told the same.

    `directory` is the exported one, `timesteps` its table, `workspace` a folder that holds what competitors are loaded
    from. `reference` names the float model; None stands for the exported weights, dequantized.
    """

    directory: str
    class_name: str
    config: dict[str, Any]
    timesteps: list[float]
    workspace: str
    threads: int
    reference: str | None = None

    def to_json(self) -> dict[str, Any]:
        """What `Subject(**value)` takes."""
        return asdict(self)

    @property
    def float_directory(self) -> Path:
        """The float network as a diffusers component directory, float32 in safetensors."""
        return Path(self.workspace) / "float"

    def inputs(self, batch: int) -> list[Arguments]:
        """Arguments of forward passes that differ in the timestep only, which is passed as samplers do: a scalar."""
        import torch

        from dqtool.models.families import family_of

        family = family_of(self.class_name, self.directory)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(batch, *family.sample_shape(self.config), generator=generator)
        conditions = family.conditions(self.config, batch, generator)
        stride = max(1, len(self.timesteps) // STEPS)
        chosen = self.timesteps[::stride][:STEPS]
        whole = all(float(t).is_integer() for t in chosen)  # of one type: what compiles looks at it
        return [family.arguments(x, torch.tensor(int(t) if whole else float(t)), conditions) for t in chosen]

    @staticmethod
    def cast(arguments: Mapping[str, Any], dtype: Any, channels_last: bool = False) -> Arguments:
        """The arguments with floating tensors (not the timestep) in `dtype`, images in the memory format asked for."""
        import torch
        from torch.utils._pytree import tree_map

        def convert(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or not value.is_floating_point():
                return value
            layout = torch.channels_last if channels_last and value.dim() == 4 else torch.preserve_format
            return value.to(dtype=dtype, memory_format=layout)

        return {key: value if key == "timestep" else tree_map(convert, value) for key, value in arguments.items()}

"""Temporal Parallel Quantizer (Eq. 22-24): one (scale, zero point) per denoising step, gathered per sample.

The step is *passed*: `StepIndex` turns the timestep the sampler gives the model into a row of the tables, through the
explicit list `timesteps` stored with the artifact. Nothing counts calls.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.core.affine import fake_quantize
from dqtool.errors import DqtoolWarning

__all__ = ["StepIndex", "gather_rows", "quantize_operand", "step_hook"]


class StepIndex:
    """The row of the step tables that each sample of the batch in flight uses; shared by all layers of a network.

    `timesteps` is `[T]`, in any order, each value once. Until `set` or `select` is called the first row is used.
    """

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps.detach().double().cpu()
        self._rows: Tensor = torch.zeros(1, dtype=torch.long)
        self._moved: Tensor = self._rows
        self.missed: set[float] = set()
        spacing = self.timesteps.sort().values.diff()
        self._tolerance = float(spacing.min()) * 1e-3 if len(spacing) else torch.inf

    def set(self, timestep: Tensor | float | int) -> None:
        """Look up `timestep` (a scalar, or `[N]` for a batch of mixed steps). One not in the table takes the nearest
        entry, warns once, and is remembered in `missed`."""
        asked = torch.as_tensor(timestep).detach().double().reshape(-1).cpu()
        distance, rows = (asked[:, None] - self.timesteps).abs().min(1)
        # A pipeline in bfloat16 rounds its timesteps; as long as the nearest entry is clear, that is the one meant.
        rounding = (asked.abs() * 2**-8).clamp(max=self._tolerance * 250)
        for value in asked[distance > rounding.clamp(min=self._tolerance)].tolist():
            if value not in self.missed:
                if not self.missed:
                    warnings.warn(
                        f"timestep {value:g} is not among the {len(self.timesteps)} calibrated ones: the nearest step's "
                        "quantizers are used. Calibrate with this sampler and number of steps for the best quality.",
                        DqtoolWarning,
                        stacklevel=3,
                    )
                self.missed.add(value)
        self.select(rows[:1] if bool((rows == rows[:1]).all()) else rows)

    def select(self, rows: Tensor) -> None:
        """Use these rows of the tables, `[N]` (or `[1]` for all samples)."""
        self._rows = self._moved = rows

    @property
    def rows(self) -> Tensor:
        """The rows in use, where they were looked up."""
        return self._rows

    def rows_beside(self, x: Tensor) -> Tensor:
        """The rows in use on the device of `x`; moved once for all layers, since each transfer waits for the device."""
        if self._moved.device != x.device:
            self._moved = self._rows.to(x.device)
        return self._moved


def step_hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
    """A forward pre-hook (`with_kwargs=True`) that feeds the root's timestep argument to the `StepIndex` it carries.

    The index is looked up on the module, not captured, so that a deep copy of the network keeps its own.
    """
    timestep = kwargs["timestep"] if "timestep" in kwargs else args[_position(type(module).forward)]
    module.__dict__["_dqtool_steps"].set(timestep)


@functools.cache
def _position(forward: Callable[..., Any]) -> int:
    """Where `timestep` stands among the arguments of a network's forward: second, but behind the texts in some."""
    names = list(inspect.signature(forward).parameters)
    return names.index("timestep") - 1 if "timestep" in names else 1


def gather_rows(table: Tensor, rows: Tensor, batch: int) -> Tensor:
    """`table[rows]`, `[n, ...]` with `n` 1 or `batch`; rows repeat where a layer sees each sample several times
    (classifier-free guidance copies, video frames). A table of one row is a static quantizer."""
    if table.shape[0] == 1:
        return table
    if len(rows) not in (1, batch):
        rows = rows.repeat_interleave(batch // len(rows))
    return table[rows.to(table.device)]


def quantize_operand(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rows: Tensor,
    bits: int,
    low: int = 0,
    divisor: Tensor | None = None,
) -> Tensor:
    """Fake-quantize `x` `[N, ...]` with the tables `scale`, `zero_point` (`[T]`, or `[T, H]` for `[N, H, ...]`)."""
    shape = (-1, *scale.shape[1:], *(1,) * (x.dim() - scale.dim()))
    s = gather_rows(scale, rows, x.shape[0]).view(shape)
    z = gather_rows(zero_point, rows, x.shape[0]).to(s.dtype).view(shape)
    return fake_quantize(x, s, z, bits, low, divisor)

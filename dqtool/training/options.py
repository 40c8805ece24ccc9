"""The training recipe's numbers. They hold for every model: nothing here is tuned to one. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["BkdOptions", "Rates"]


@dataclass(frozen=True)
class Rates:
    """Learning rates, each in the unit of what it moves.

    weight: of the layer's mean weight scale, per step; bias: of the root mean square of the layer's biases;
    weight_scale, table_scale: relative; zero_point: codes.
    """

    weight: float = 0.1
    bias: float = 0.01
    weight_scale: float = 1e-3
    table_scale: float = 1e-2
    zero_point: float = 1e-2


@dataclass(frozen=True)
class BkdOptions:
    """Iterations: `iters` for each block, `refine_iters` for the pass over all blocks; 0 skips that part.

    `refine_images` are sampled anew every `refine_refresh` iterations.
    """

    iters: int = 300
    batch_size: int = 32
    rates: Rates = field(default_factory=Rates)
    refine_iters: int = 1500
    refine_batch_size: int = 32
    refine_rates: Rates = field(default_factory=Rates)
    refine_images: int = 128
    refine_refresh: int = 300

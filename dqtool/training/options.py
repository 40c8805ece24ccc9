"""The training recipe's numbers. They hold for every model: nothing here is tuned to one. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["EXTRAPOLATING", "FINE", "BkdOptions", "OnPolicyOptions", "PerStepOptions", "Rates", "RoundingOptions"]


@dataclass(frozen=True)
class Rates:
    """Learning rates, each in the unit of what it moves.

    weight: of the layer's mean weight scale, per step; bias: of the root mean square of the layer's biases;
    weight_scale, table_scale: relative; zero_point: codes.
    """

    weight: float = 0.05
    bias: float = 0.01
    weight_scale: float = 5e-4
    table_scale: float = 3e-3
    zero_point: float = 5e-3


FINE = Rates(weight=0.004, bias=1e-3, weight_scale=1e-4, table_scale=1e-3, zero_point=1e-3)
"""For the pass over all blocks. Faster ones undo what the blocks learned: with 0.05 for the weights the distance grew."""


@dataclass(frozen=True)
class OnPolicyOptions:
    """`iters` of the whole network on its own trajectory; `images` are sampled anew every `refresh` iterations."""

    iters: int = 600
    batch_size: int = 32
    rates: Rates = field(default_factory=lambda: Rates(weight=0.02))
    images: int = 128
    refresh: int = 150


@dataclass(frozen=True)
class BkdOptions:
    """Iterations: `iters` for each block, `refine_iters` for the pass over all blocks; 0 skips that part.

    `refine_images` are sampled anew every `refine_refresh` iterations.
    """

    iters: int = 300
    batch_size: int = 32
    rates: Rates = field(default_factory=Rates)
    refine_iters: int = 300
    refine_batch_size: int = 32
    refine_rates: Rates = FINE
    refine_images: int = 128
    refine_refresh: int = 300

    def second_pass(self) -> OnPolicyOptions:
        """That over all blocks, by itself."""
        return OnPolicyOptions(
            self.refine_iters, self.refine_batch_size, self.refine_rates, self.refine_images, self.refine_refresh
        )


@dataclass(frozen=True)
class RoundingOptions:
    """Learned rounding, `iters` for each block. `round_rate`: Adam's rate for v; `penalty`: the regulariser's weight per
    rounded weight, against the squared error summed over channels, in units of the output's mean square; `table_scale`:
    relative rate of activation scales; `beta_start` to `beta_end` after `warm_up` of the iterations: its annealing.

    The sources take 20 000 iterations at a rate of 1e-3 (4e-5, absolute, for activation scales); with so many fewer the
    rates must grow.
    """

    iters: int = 300
    batch_size: int = 32
    round_rate: float = 2e-2
    penalty: float = 0.01
    table_scale: float = 3e-3
    beta_start: float = 20.0
    beta_end: float = 2.0
    warm_up: float = 0.2


@dataclass(frozen=True)
class PerStepOptions(RoundingOptions):
    """Options of `per-step`: the share `rounding` of a block's `iters` trains its weights, the rest is divided evenly among
    the steps (at least one iteration each)."""

    rounding: float = 0.5


EXTRAPOLATING = ("PNDMScheduler", "LMSDiscreteScheduler", "IPNDMScheduler")
"""Schedulers of diffusers that take a step from the last four predictions at once (Adams-Bashforth), weighted by 55, -59,
37 and -9 in 24: what all of them have in common passes as it is, what differs from one to the next comes out 3.7 times as large.
Quantization's noise is of that kind. Measured with PLMS (`make table-samplers`), samples are nearer to the float network's
without the second pass and the correction of predictions, which both bring a network's answer to such noise nearer to the float
one's and so may pass more of it on."""

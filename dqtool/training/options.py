"""Default options of the training methods, the same for every model. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = [
    "EXTRAPOLATING",
    "FINE",
    "BkdOptions",
    "OnPolicyOptions",
    "PerStepOptions",
    "Rates",
    "RoundingOptions",
    "without_second_pass",
]


@dataclass(frozen=True)
class Rates:
    """Learning rates, each in the unit of the parameter.

    Attributes:
        weight: fraction of the layer's mean weight scale.
        bias: fraction of the root mean square of the layer's biases.
        weight_scale: relative, as is `table_scale`.
        zero_point: fraction of a code.
    """

    weight: float = 0.05
    bias: float = 0.01
    weight_scale: float = 5e-4
    table_scale: float = 3e-3
    zero_point: float = 5e-3

    def times(self, factor: float) -> Rates:
        """Return all rates multiplied by `factor`."""
        return Rates(*(factor * getattr(self, each.name) for each in fields(self)))


FINE = Rates(weight=0.004, bias=1e-3, weight_scale=1e-4, table_scale=1e-3, zero_point=1e-3)
"""Rates of the pass over all blocks. Higher ones undo what the blocks learned: 0.05 for weights increased the distance.
"""


@dataclass(frozen=True)
class OnPolicyOptions:
    """Options of training on the student's own trajectory: `images` are sampled anew every `refresh` of the `iters`
    iterations."""

    iters: int = 600
    batch_size: int = 32
    rates: Rates = field(default_factory=lambda: Rates(weight=0.02))
    images: int = 128
    refresh: int = 150


@dataclass(frozen=True)
class BkdOptions:
    """Options of `bkd`: `iters` for each block and `refine_iters` for the pass over all blocks; 0 skips that part.

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
        """Return the options of the pass over all blocks."""
        return OnPolicyOptions(
            self.refine_iters, self.refine_batch_size, self.refine_rates, self.refine_images, self.refine_refresh
        )


@dataclass(frozen=True)
class RoundingOptions:
    """Options of learned rounding.

    The sources take 20 000 iterations at a rate of 1e-3 (4e-5, absolute, for activation scales); so few iterations as
    here need higher rates.

    Attributes:
        iters: iterations for each block.
        round_rate: rate of v.
        penalty: weight of the regulariser for each rounded weight, relative to the squared error summed over channels
            and divided by the output's mean square.
        table_scale: relative rate of activation scales.
        beta_start: exponent of the regulariser after the warm-up; it falls to `beta_end`.
        warm_up: share of the iterations without the regulariser.
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
    """Options of `per-step`.

    The share `rounding` of a block's `iters` trains its weights. The rest is divided evenly among the steps, with at
    least one iteration each.
    """

    rounding: float = 0.5


EXTRAPOLATING = ("PNDMScheduler", "LMSDiscreteScheduler", "IPNDMScheduler")
"""Schedulers of diffusers that extrapolate from the last four predictions (Adams-Bashforth, weights 55, -59, 37 and -9
over 24).

The common part of the four predictions passes unchanged; differences between them are amplified 3.7 times. Quantization
noise differs from step to step. With PLMS (`make table-samplers`), samples are measurably closer to the float network's
without the second pass and without the correction of predictions: both bring a network's answer to such noise closer to
the float network's and may pass more of the noise on.
"""


def without_second_pass(options: Any, given: Mapping[str, object]) -> Any:
    """Return options with `refine_iters` 0 where the user gave `iters` 0 (plain PTQ) and no `refine_iters`."""
    return replace(options, refine_iters=0) if options.iters == 0 and "refine_iters" not in given else options

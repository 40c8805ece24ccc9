"""What a scaling method is given and gives, and the registry of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dqtool.core.bits import LayerBits
from dqtool.core.dilation import CAP, dilate_weight, in_channels, spread
from dqtool.errors import NumericError, UsageError

__all__ = [
    "SCALINGS",
    "Samples",
    "ScalingInput",
    "ScalingMethod",
    "ScalingResult",
    "register",
    "scale_weight",
    "scaling_method",
]


@dataclass(frozen=True)
class Samples:
    """What a layer really read at some steps: `steps` holds `[n, C_in, H, W]` or `[n, ..., C_in]`, one tensor a step.

    `products` are the layer's own (convolution or linear, without bias), one for each weight: `(x, W) -> y`. `bits` are
    those the layer will have.
    """

    steps: Sequence[Tensor]
    products: Sequence[Callable[[Tensor, Tensor], Tensor]]
    bits: LayerBits
    channel_dim: int = -1


@dataclass(frozen=True)
class ScalingInput:
    """One quantized input and every weight that reads it (q, k, v of a self-attention share theirs)."""

    weights: list[Tensor]  # each [C_out, C_in / groups, ...]
    groups: int = 1
    input_min: Tensor | None = None  # [C_in], pooled over all steps
    input_max: Tensor | None = None  # [C_in]
    cap: float = CAP  # largest dilation, `wd` only
    threshold: float = 1.0  # `wd` leaves channels alone that could not grow by as much
    samples: Samples | None = None
    shiftable: bool = False  # whether a shift of the input can be taken by what makes it, and by the layer's bias
    slacks: Sequence[Tensor | None] | None = None  # of each weight its `channel_slack` where known, `wd` only

    @property
    def channels(self) -> int:
        """`C_in`."""
        return in_channels(self.weights[0], self.groups)

    def input_absmax(self) -> Tensor:
        """`a_k = max |x_k|` over all steps, `[C_in]` float32."""
        assert self.input_min is not None
        assert self.input_max is not None
        return torch.maximum(self.input_min.detach().float().abs(), self.input_max.detach().float().abs())

    def weight_absmax(self) -> Tensor:
        """`w_k = max |W[:, k]|` over all the weights (and the out-channels of k's group), `[C_in]` float32."""
        maxima = []
        for weight in self.weights:
            per_row = weight.detach().float().abs().reshape(*weight.shape[:2], -1).amax(dim=2)  # [C_out, C_in / groups]
            maxima.append(per_row.view(self.groups, -1, per_row.shape[1]).amax(dim=1).flatten())
        return torch.stack(maxima).amax(dim=0)


@dataclass(frozen=True)
class ScalingResult:
    """What a method chose; `shift` is subtracted from the input before it is divided by `scale`.

    `method` names whose scale it is where that isn't the method that was asked (`auto`).
    """

    scale: Tensor  # [C_in] float32, > 0
    shift: Tensor | None = None  # [C_in] float32
    method: str | None = None


@dataclass(frozen=True)
class ScalingMethod:
    """A registered method: call it with a `ScalingInput`.

    `needs_statistics`: it reads the input's range, hence a calibrated artifact; `needs_samples`: inputs themselves.
    `keeps_range`: no out-channel's range moves, so that quantizers of the weights fitted before it still fit. `shifts`:
    it moves the input too where that is possible. `learning_rate`: of the log scale, which training starts from and
    moves; 0 where it leaves it. `learns_shift`: training moves the shift as well, at that rate.
    """

    name: str
    function: Callable[[ScalingInput], ScalingResult]
    needs_statistics: bool = False
    needs_samples: bool = False
    keeps_range: bool = False
    shifts: bool = False
    learning_rate: float = 0.0
    learns_shift: bool = False

    def __call__(self, inputs: ScalingInput) -> ScalingResult:
        """Scale (and shift) for these weights.

        Raises `UsageError` if the method needs statistics that are missing or of another shape, `NumericError` if its
        result isn't positive and finite.
        """
        if self.needs_statistics:
            if inputs.input_min is None or inputs.input_max is None:
                raise UsageError(
                    f"The scaling {self.name} looks at activations, and there are no statistics of them.",
                    where="--scaling",
                    fix="Give a calibrated artifact of the same model with --stats, or use --scaling wd.",
                )
            shapes = {tuple(inputs.input_min.shape), tuple(inputs.input_max.shape)}
            if shapes != {(inputs.channels,)}:
                raise UsageError(
                    f"The statistics don't belong to this layer: {inputs.channels} in-channels, statistics {shapes}.",
                    where="--stats",
                    fix="Calibrate this model.",
                )
        if self.needs_samples and inputs.samples is None:
            raise UsageError(
                f"The scaling {self.name} compares outputs, and no inputs of this layer were sampled.",
                where="--stats",
                fix="Give a calibrated artifact of the same model.",
            )
        result = self.function(inputs)
        if not (torch.isfinite(result.scale).all() and (result.scale > 0).all()):
            raise NumericError(
                f"The scaling {self.name} gave scales that are not positive and finite.",
                fix="Look for NaN or Inf in the weights and in the calibrated statistics.",
            )
        return result

    def apply(self, weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
        """The scaled weight, float32: with ranges kept bitwise by the methods that promise it."""
        return (dilate_weight if self.keeps_range else scale_weight)(weight, scale, groups)


SCALINGS: dict[str, ScalingMethod] = {}
Function = TypeVar("Function", bound=Callable[..., ScalingResult])


def register(name: str, **properties: Any) -> Callable[[Function], Function]:
    """Decorator that offers a function under `--scaling name`; `properties` are those of `ScalingMethod`."""

    def add(function: Function) -> Function:
        SCALINGS[name] = ScalingMethod(name, function, **properties)
        return function

    return add


def scaling_method(name: str) -> ScalingMethod:
    """The method of that name; raises `UsageError` with the names there are."""
    if name not in SCALINGS:
        raise UsageError(f"There is no scaling {name!r}.", where="--scaling", fix=f"Choose from {', '.join(SCALINGS)}.")
    return SCALINGS[name]


def scale_weight(weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """`s_k · W` in float32, of the weight's shape."""
    weight = weight.detach().float()
    return weight * spread(scale, weight, groups)

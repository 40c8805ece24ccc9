"""The interface of a scaling method: `ScalingInput` in, `ScalingResult` out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqtool.core.bits import LayerBits
from dqtool.core.dilation import CAP, broadcast_scale, dilate_weight, in_channels
from dqtool.errors import NumericError, UsageError

__all__ = ["Samples", "ScalingInput", "ScalingMethod", "ScalingResult", "scale_weight"]


@dataclass(frozen=True)
class Samples:
    """Calibration inputs of one group of layers: `steps` holds a tensor a step, `[n, C_in, H, W]` or `[n, ..., C_in]`.

    `operations` are the layers themselves (convolution or linear, without bias), one for each weight: `(x, W) -> y`.
    `bits` are those the layer will have.
    """

    steps: Sequence[Tensor]
    operations: Sequence[Callable[[Tensor, Tensor], Tensor]]
    bits: LayerBits
    channel_dim: int = -1


@dataclass(frozen=True)
class ScalingInput:
    """One quantized input and every weight that reads it (q, k and v of a self-attention share theirs)."""

    weights: list[Tensor]  # each [C_out, C_in / groups, ...]
    groups: int = 1
    input_min: Tensor | None = None  # [C_in], over all steps
    input_max: Tensor | None = None  # [C_in]
    cap: float = CAP  # largest dilation, `wd` only
    threshold: float = 1.0  # `wd` leaves channels alone whose dilation would be smaller
    samples: Samples | None = None
    shiftable: bool = False  # the input's producer and the layers' biases can absorb a shift of the input
    present: ScalingResult | None = None  # factors that the artifact has now, of a method that reads weights

    @property
    def channels(self) -> int:
        """`C_in`."""
        return in_channels(self.weights[0], self.groups)

    def input_absmax(self) -> Tensor:
        """Return `a_k = max |x_k|` over all steps, `[C_in]` float32."""
        assert self.input_min is not None
        assert self.input_max is not None
        return torch.maximum(self.input_min.detach().float().abs(), self.input_max.detach().float().abs())

    def weight_absmax(self) -> Tensor:
        """Return `w_k = max |W[:, k]|` over all weights and the out-channels of k's group, `[C_in]` float32."""
        maxima = []
        for weight in self.weights:
            per_row = weight.detach().float().abs().reshape(*weight.shape[:2], -1).amax(dim=2)  # [C_out, C_in / groups]
            maxima.append(per_row.view(self.groups, -1, per_row.shape[1]).amax(dim=1).flatten())
        return torch.stack(maxima).amax(dim=0)

    def midpoint(self) -> Tensor:
        """Return the middle of every channel's range, `(max + min) / 2`, `[C_in]`: the shift that centres the input."""
        assert self.input_min is not None
        assert self.input_max is not None
        return (self.input_max.detach().float() + self.input_min.detach().float()) / 2

    def shifted(self, shift: Tensor) -> ScalingInput:
        """Return the same layer with the input `x - shift`."""
        assert self.input_min is not None
        assert self.input_max is not None
        return replace(self, input_min=self.input_min - shift, input_max=self.input_max - shift)


@dataclass(frozen=True)
class ScalingResult:
    """Factors of one input; `shift` is subtracted from the input before it is divided by `scale`.

    `method` names the method whose formula gave `scale`, where that isn't the method that was asked (`auto`). `rotation` is the
    group size of a rotation of the input's channels, 0 for none; then `scale` is 1.
    """

    scale: Tensor  # [C_in] float32, > 0
    shift: Tensor | None = None  # [C_in] float32
    method: str | None = None
    rotation: int = 0


@dataclass(frozen=True)
class ScalingMethod:
    """A scaling method; call it with a `ScalingInput`.

    Attributes:
        name: value of `--scaling`.
        function: the method itself.
        needs_statistics: it reads the input's range.
        needs_samples: it reads calibration inputs themselves.
        keeps_range: no out-channel's range changes, so the scaled weight is clipped to it (Eq. 19).
        shifts: it may also shift the input.
        learning_rate: rate of the log scale in `distill`, which starts from the method's result; 0: not learned.
        learns_shift: `distill` learns the shift as well, at the same rate.
    """

    name: str
    function: Callable[[ScalingInput], ScalingResult]
    needs_statistics: bool = False
    needs_samples: bool = False
    keeps_range: bool = False
    shifts: bool = False
    learning_rate: float = 0.0
    learns_shift: bool = False

    @property
    def needs_activations(self) -> bool:
        """Return whether the method belongs to `calibrate`, which sees activations."""
        return self.needs_statistics or self.needs_samples

    def __call__(self, inputs: ScalingInput) -> ScalingResult:
        """Return the factors for these weights.

        Raises:
            UsageError: the method needs statistics or samples, and they are missing or of another shape.
            NumericError: the result isn't positive and finite.
        """
        if self.needs_statistics:
            if inputs.input_min is None or inputs.input_max is None:
                raise UsageError(
                    f"The scaling {self.name} looks at activations, and there are no statistics of them",
                    where="--scaling",
                    fix=f"Use `dqtool calibrate --scaling {self.name}`, which records them",
                )
            shapes = {tuple(inputs.input_min.shape), tuple(inputs.input_max.shape)}
            if shapes != {(inputs.channels,)}:
                raise UsageError(
                    f"The statistics don't belong to this layer: {inputs.channels} in-channels, statistics {shapes}",
                    where="--scaling",
                    fix="Calibrate this model",
                )
        if self.needs_samples and inputs.samples is None:
            raise UsageError(
                f"The scaling {self.name} compares outputs, and no inputs of this layer were sampled",
                where="--scaling",
                fix=f"Use `dqtool calibrate --scaling {self.name}`, which samples them",
            )
        result = self.function(inputs)
        if not (torch.isfinite(result.scale).all() and (result.scale > 0).all()):
            raise NumericError(
                f"The scaling {self.name} gave scales that are not positive and finite.",
                fix="Look for NaN or Inf in the weights and in the calibrated statistics.",
            )
        return result

    def apply(self, weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
        """Return the scaled weight, float32; its ranges are bitwise the same if the method keeps them."""
        return (dilate_weight if self.keeps_range else scale_weight)(weight, scale, groups)


def scale_weight(weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """Return `s_k · W` in float32, of the weight's shape."""
    weight = weight.detach().float()
    return weight * broadcast_scale(scale, weight, groups)

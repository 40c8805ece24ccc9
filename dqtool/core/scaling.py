"""The equivalent scalings Weight Dilation is compared with (Table 14 and App. H of arXiv 2409.14307), as a registry.

All of them divide the input's channels by `s` and multiply the weight's by it, `(W · s)(x / s) = W x` (Eq. 5); they
differ in what they look at. A method is one registered function:

    @register("mine", needs_statistics=True)
    def mine(inputs: ScalingInput) -> ScalingResult: ...
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dqtool.core.dilation import CAP, dilate_weight, in_channels, spread, weight_dilation
from dqtool.errors import NumericError, UsageError

__all__ = ["SCALINGS", "ScalingInput", "ScalingMethod", "ScalingResult", "register", "scale_weight", "scaling_method"]


@dataclass(frozen=True)
class ScalingInput:
    """One quantized input and every weight that reads it (q, k, v of a self-attention share theirs)."""

    weights: list[Tensor]  # each [C_out, C_in / groups, ...]
    groups: int = 1
    input_min: Tensor | None = None  # [C_in], pooled over all steps
    input_max: Tensor | None = None  # [C_in]
    cap: float = CAP  # largest dilation, `wd` only

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
    """What a method chose; `shift` is subtracted from the input before it is divided by `scale`."""

    scale: Tensor  # [C_in] float32, > 0
    shift: Tensor | None = None  # [C_in] float32


@dataclass(frozen=True)
class ScalingMethod:
    """A registered method: call it with a `ScalingInput`.

    `needs_statistics`: it reads the input's range, hence a calibrated artifact. `keeps_range`: no out-channel's range
    moves, so that quantizers of the weights fitted before it still fit.
    """

    name: str
    function: Callable[[ScalingInput], ScalingResult]
    needs_statistics: bool = False
    keeps_range: bool = False

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


def register(
    name: str, *, needs_statistics: bool = False, keeps_range: bool = False
) -> Callable[[Callable[[ScalingInput], ScalingResult]], Callable[[ScalingInput], ScalingResult]]:
    """Decorator that offers a function under `--scaling name`."""

    def add(function: Callable[[ScalingInput], ScalingResult]) -> Callable[[ScalingInput], ScalingResult]:
        SCALINGS[name] = ScalingMethod(name, function, needs_statistics, keeps_range)
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


@register("wd", keeps_range=True)
def wd(inputs: ScalingInput) -> ScalingResult:
    """Weight Dilation (section 4.1 of the paper): weights only."""
    return ScalingResult(weight_dilation(inputs.weights, inputs.groups, inputs.cap))


@register("none", keeps_range=True)
def none(inputs: ScalingInput) -> ScalingResult:
    """No scaling: all ones."""
    return ScalingResult(torch.ones(inputs.channels, device=inputs.weights[0].device))


@register("smoothquant", needs_statistics=True)
def smoothquant(inputs: ScalingInput, alpha: float = 0.5, floor: float = 1e-5) -> ScalingResult:
    """`a_k^α / w_k^(1-α)`, at least 1e-5, possibly below 1 (arXiv 2211.10438, Eq. 4); 1 for dead channels."""
    a, w = inputs.input_absmax(), inputs.weight_absmax()
    scale = (a.pow(alpha) / w.clamp(min=floor).pow(1 - alpha)).clamp(min=floor)
    # A channel that is always zero, or that nothing reads, has no range to trade: the formula's 0 would blow it up by
    # 1 / floor the first time it isn't zero.
    return ScalingResult(torch.where((a == 0) | (w == 0), torch.ones_like(scale), scale))


@register("awq", needs_statistics=True)
def awq(inputs: ScalingInput, share: float = 0.01) -> ScalingResult:
    """SmoothQuant's scale on the 1 % of channels (at least one) with the largest `a_k`, 1 elsewhere (App. H)."""
    a = inputs.input_absmax()
    salient = a.argsort(descending=True, stable=True)[: max(1, math.floor(share * a.numel()))]
    scale = torch.ones_like(a)
    scale[salient] = smoothquant(inputs).scale[salient]
    return ScalingResult(scale)


@register("dgq", needs_statistics=True)
def dgq(inputs: ScalingInput, quantile: float = 0.995) -> ScalingResult:
    """`max(1, a_k / τ)` with τ the 99.5th percentile of `{a_k}`: only outlying channels are scaled (App. H)."""
    a = inputs.input_absmax()
    threshold = torch.quantile(a.double(), quantile).float()
    # All channels zero: nothing to scale. NaN statistics pass through, for the caller's check to find.
    return ScalingResult((a / threshold).clamp(min=1) if threshold != 0 else torch.ones_like(a))

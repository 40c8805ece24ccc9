"""Learned rounding (AdaRound, arXiv 2004.10568; for blocks BRECQ, arXiv 2102.05426): each weight is rounded up or down.

Scales and zero points of the weights stay fixed. During training a weight lies between its two neighbouring codes, at
`floor(W/Δ) + h(v)` with the rectified sigmoid h. A regulariser drives h to 0 or 1, and the final weight has one of the
two.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dqtool.core.affine import levels
from dqtool.nn.attention import OPERANDS
from dqtool.nn.layers import FakeQuantLayer, WeightAdapter

__all__ = ["Annealing", "SoftRounding", "float_activations", "learn_rounding", "merge_adapters", "rounding_penalty"]

ZETA, GAMMA = 1.1, -0.1
"""Bounds of the stretched sigmoid, which is then clipped to [0, 1]."""


class SoftRounding(WeightAdapter):
    """Learned rounding of one weight: `v` has the weight's shape, and a positive value rounds up.

    At first h(v) is the fraction of the weight between its codes, so that the weight is unchanged.
    """

    base: Tensor

    def __init__(self, layer: FakeQuantLayer) -> None:
        super().__init__()
        assert layer.weight_scale is not None
        scaled = layer.weight.detach() * _rows(layer.weight_scale, layer.weight).reciprocal()
        self.register_buffer("base", scaled.floor(), persistent=False)
        rest = scaled - self.base
        self.v = nn.Parameter(-((ZETA - GAMMA) / (rest - GAMMA) - 1).log())

    def up(self) -> Tensor:
        """Return h(v) in [0, 1]: 0 is the code below each weight and 1 the code above it."""
        return (self.v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def quantized_weight(self, layer: FakeQuantLayer) -> Tensor:
        """Return the weight between its two codes."""
        return self._dequantized(layer, self.base + self.up())

    def merge(self, layer: FakeQuantLayer) -> None:
        """Set the weight to the centre of the code that it is rounded to, and remove the adapter."""
        with torch.no_grad():
            layer.weight.copy_(self._dequantized(layer, self.base + (self.v >= 0)))
        layer.adapter = None

    @staticmethod
    def _dequantized(layer: FakeQuantLayer, codes: Tensor) -> Tensor:
        assert layer.weight_scale is not None
        assert layer.weight_zero_point is not None
        zero = _rows(layer.weight_zero_point, codes).round()
        codes = torch.minimum(torch.maximum(codes, layer.low - zero), levels(layer.bits.weight) - zero)
        return codes * _rows(layer.weight_scale, codes)


@dataclass(frozen=True)
class Annealing:
    """Schedule of the regulariser: off for the first `warm_up` share of the iterations, then beta from `start` to
    `end`."""

    warm_up: float = 0.2
    start: float = 20.0
    end: float = 2.0

    def beta(self, step: int, total: int) -> float | None:
        """Return the exponent at this iteration; None during the warm-up."""
        first = self.warm_up * total
        if step < first:
            return None
        return self.end + (self.start - self.end) * max(0.0, 1 - (step - first) / max(1.0, total - first))


def learn_rounding(layers: Iterable[FakeQuantLayer]) -> list[SoftRounding]:
    """Attach learned rounding to the layers with a quantized weight and return it."""
    found = []
    for layer in layers:
        if layer.weight_scale is not None:
            layer.adapter = SoftRounding(layer)
            found.append(layer.adapter)
    return found


def rounding_penalty(roundings: Iterable[SoftRounding], beta: float) -> Tensor:
    """Return Σ 1 − |2 h(v) − 1|^β over all weights."""
    return torch.stack([(1 - (2 * each.up() - 1).abs().pow(beta)).sum() for each in roundings]).sum()


def merge_adapters(module: nn.Module) -> None:
    """Merge every adapter inside `module` into its weight."""
    for layer in list(module.modules()):
        if isinstance(layer, FakeQuantLayer) and layer.adapter is not None:
            layer.adapter.merge(layer)


@contextmanager
def float_activations(module: nn.Module) -> Iterator[None]:
    """Leave the activations and attention operands of `module` unquantized inside the context."""
    taken: list[tuple[nn.Module, str, nn.Parameter]] = []
    for each in module.modules():
        for name in ("input", *OPERANDS):
            for kind in ("scale", "zero_point"):
                held = each._parameters.get(f"{name}_{kind}")
                if held is not None:
                    taken.append((each, f"{name}_{kind}", held))
                    each._parameters[f"{name}_{kind}"] = None
    try:
        yield
    finally:
        for each, name, parameter in taken:
            each._parameters[name] = parameter


def _rows(per_channel: Tensor, weight: Tensor) -> Tensor:
    """Return per-channel values in a shape that broadcasts against `weight`."""
    return per_channel.detach().view(-1, *(1,) * (weight.dim() - 1))

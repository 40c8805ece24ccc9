"""Learned rounding (AdaRound, arXiv 2004.10568; in blocks BRECQ, arXiv 2102.05426): up or down, for each weight.

The scales and zero points of the weights stay as they are. While it learns, a weight lies between its two neighbouring
codes, at `floor(W/Δ) + h(v)` with the rectified sigmoid h; a regulariser drives h to 0 or 1, and at the end it is one of them.
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
"""The rectified sigmoid is stretched to [GAMMA, ZETA] and clipped to [0, 1]."""


class SoftRounding(WeightAdapter):
    """`v`, shaped like the weight; positive rounds up. At first h(v) is the weight's own fraction: nothing is changed."""

    base: Tensor

    def __init__(self, layer: FakeQuantLayer) -> None:
        super().__init__()
        assert layer.weight_scale is not None
        scaled = layer.weight.detach() * _rows(layer.weight_scale, layer.weight).reciprocal()
        self.register_buffer("base", scaled.floor(), persistent=False)
        rest = scaled - self.base
        self.v = nn.Parameter(-((ZETA - GAMMA) / (rest - GAMMA) - 1).log())

    def up(self) -> Tensor:
        """h(v): how far each weight is on its way from the code below to the one above, in [0, 1]."""
        return (self.v.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def quantized_weight(self, layer: FakeQuantLayer) -> Tensor:
        """The weight between its codes."""
        return self._dequantized(layer, self.base + self.up())

    def merge(self, layer: FakeQuantLayer) -> None:
        """The weight becomes the centre of the code it was rounded to."""
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
    """The regulariser's course: nothing for the first `warm_up` of the iterations, then beta from `start` to `end`."""

    warm_up: float = 0.2
    start: float = 20.0
    end: float = 2.0

    def beta(self, step: int, total: int) -> float | None:
        """The exponent at this iteration; None while warming up."""
        first = self.warm_up * total
        if step < first:
            return None
        return self.end + (self.start - self.end) * max(0.0, 1 - (step - first) / max(1.0, total - first))


def learn_rounding(layers: Iterable[FakeQuantLayer]) -> list[SoftRounding]:
    """Make the rounding of these layers' weights learnable, where they are quantized."""
    found = []
    for layer in layers:
        if layer.weight_scale is not None:
            layer.adapter = SoftRounding(layer)
            found.append(layer.adapter)
    return found


def rounding_penalty(roundings: Iterable[SoftRounding], beta: float) -> Tensor:
    """Σ 1 − |2 h(v) − 1|^β over all weights."""
    return torch.stack([(1 - (2 * each.up() - 1).abs().pow(beta)).sum() for each in roundings]).sum()


def merge_adapters(module: nn.Module) -> None:
    """Put what adapters inside `module` learned into the weights."""
    for layer in list(module.modules()):
        if isinstance(layer, FakeQuantLayer) and layer.adapter is not None:
            layer.adapter.merge(layer)


@contextmanager
def float_activations(module: nn.Module) -> Iterator[None]:
    """Inside, activations and attention operands of `module` are not quantized."""
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
    return per_channel.detach().view(-1, *(1,) * (weight.dim() - 1))

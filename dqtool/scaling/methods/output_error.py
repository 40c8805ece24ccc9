"""How far a layer's output moves when its scaled weight and input are quantized: what searching methods minimise."""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.core.affine import SYMMETRIC_BITS, fake_quantize, lowest_code, search_histogram, search_weight
from dqtool.scaling.methods.base import ScalingInput, ScalingResult, scale_weight

__all__ = ["OutputError"]

BINS = 512
CANDIDATES = 20
"""Shrink factors tried for a quantizer's range: fewer than a real quantizer gets, the same for all that is compared."""


class OutputError:
    """`‖Q(W s) Q((x − z)/s) − W (x − z)‖² / ‖W x‖²` for one scaling, summed over the weights that read the input.

    Every step's input has its own quantizer, as in the model (Eq. 22). What is divided by is the same for every scaling,
    so that moved inputs compare with those that were not.
    """

    def __init__(self, inputs: ScalingInput) -> None:
        assert inputs.samples is not None
        self.inputs, self.samples = inputs, inputs.samples
        self.weights = [weight.detach().float() for weight in inputs.weights]
        self._unmoved: list[list[Tensor]] | None = None  # of the input as it is, for every step and weight
        self._energy: list[float] = []  # of that, for every weight

    @torch.no_grad()
    def __call__(self, result: ScalingResult) -> float:
        """The error with this scaling, at `samples.bits`."""
        samples, bits = self.samples, self.samples.bits
        divisor = self._laid_out(result.scale)
        shift = None if result.shift is None else self._laid_out(result.shift)
        weights = [
            _quantized_weight(scale_weight(w, result.scale, self.inputs.groups), bits.weight) for w in self.weights
        ]
        wrong = [0.0] * len(weights)
        unmoved = self._of_the_input()
        inputs = [x.float() if shift is None else x.float() - shift for x in samples.steps]
        expected = unmoved if shift is None else self._outputs(inputs)
        for wanted, quantized in zip(
            expected, _quantized_inputs([x / divisor for x in inputs], bits.input), strict=True
        ):
            for i, (product, y, scaled) in enumerate(zip(samples.products, wanted, weights, strict=True)):
                wrong[i] += float((product(quantized, scaled) - y).square().sum())
        return sum(w / n for w, n in zip(wrong, self._energy, strict=True) if n)

    def _of_the_input(self) -> list[list[Tensor]]:
        if self._unmoved is None:
            self._unmoved = self._outputs([x.float() for x in self.samples.steps])
            self._energy = [sum(float(y.square().sum()) for y in of_one) for of_one in zip(*self._unmoved, strict=True)]
        return self._unmoved

    def _outputs(self, inputs: list[Tensor]) -> list[list[Tensor]]:
        """What the float weights make of every step's input."""
        return [
            [product(x, weight) for product, weight in zip(self.samples.products, self.weights, strict=True)]
            for x in inputs
        ]

    def _laid_out(self, channels: Tensor) -> Tensor:
        dim = self.samples.channel_dim
        return channels.view(-1, *(1,) * (-1 - dim if dim < 0 else self.samples.steps[0].dim() - 1 - dim))


def _quantized_weight(weight: Tensor, bits: int) -> Tensor:
    if bits >= 16:
        return weight
    symmetric = bits == SYMMETRIC_BITS
    scale, zero_point = search_weight(weight, bits, symmetric, CANDIDATES)
    shape = (-1, *(1,) * (weight.dim() - 1))
    return fake_quantize(weight, scale.view(shape), zero_point.view(shape), bits, lowest_code(bits, symmetric))


def _quantized_inputs(steps: list[Tensor], bits: int) -> list[Tensor]:
    """Every step's input on the grid that fits it best; all grids are searched at once."""
    if bits >= 16:
        return steps
    lo, hi = torch.stack([torch.stack(torch.aminmax(x)) for x in steps]).unbind(1)  # [T]
    # A step of one value only gets some range: its histogram has one bin, and zero is exact on any grid.
    hi = torch.where(lo < hi, hi, lo + 1)
    counts = torch.stack([torch.histc(x, BINS, float(a), float(b)) for x, a, b in zip(steps, lo, hi, strict=True)])
    found = search_histogram(counts.cpu(), lo.cpu(), hi.cpu(), bits, candidates=CANDIDATES)
    scale, zero_point = (table.to(lo.device) for table in found)
    return [fake_quantize(x, s, z, bits) for x, s, z in zip(steps, scale, zero_point, strict=True)]

"""Error of a layer's output after quantizing its scaled weight and input: what searching methods minimise."""

from __future__ import annotations

import torch
from torch import Tensor

from dqtool.core.affine import SYMMETRIC_BITS, fake_quantize, lowest_code, search_histogram, search_weight
from dqtool.core.rotation import rotate, rotate_weight
from dqtool.scaling.methods.base import ScalingInput, ScalingResult, scale_weight

__all__ = ["OutputError"]

BINS = 512
CANDIDATES = 20
"""Shrink factors tried for a quantizer's range: fewer than a real quantizer gets, the same for every candidate."""


class OutputError:
    """`‖Q(W s) Q((x − z)/s) − W (x − z)‖² / ‖W x‖²` for one scaling, summed over the weights that read the input.

    Every step's input has its own quantizer, as in the model (Eq. 22). The denominator is the same for every scaling, so
    that the errors of shifted and unshifted inputs compare.
    """

    def __init__(self, inputs: ScalingInput) -> None:
        assert inputs.samples is not None
        self.inputs, self.samples = inputs, inputs.samples
        self.weights = [weight.detach().float() for weight in inputs.weights]
        self._unshifted: list[list[Tensor]] | None = None  # float outputs of the unshifted input, by step and weight
        self._energy: list[float] = []  # their sum of squares, by weight

    @torch.no_grad()
    def __call__(self, result: ScalingResult) -> float:
        """Return the error with this scaling, at `samples.bits`."""
        samples, bits = self.samples, self.samples.bits
        divisor = self._broadcast(result.scale)
        shift = None if result.shift is None else self._broadcast(result.shift)
        weights = [
            _quantized_weight(
                scale_weight(rotate_weight(w, result.rotation), result.scale, self.inputs.groups), bits.weight
            )
            for w in self.weights
        ]
        squares = [0.0] * len(weights)
        unshifted = self._reference_outputs()
        inputs = [x.float() if shift is None else x.float() - shift for x in samples.steps]
        expected = unshifted if shift is None else self._outputs(inputs)
        for wanted, quantized in zip(
            expected, _quantized_inputs([self._rotated(x, result) / divisor for x in inputs], bits.input), strict=True
        ):
            for i, (operation, y, scaled) in enumerate(zip(samples.operations, wanted, weights, strict=True)):
                squares[i] += float((operation(quantized, scaled) - y).square().sum())
        return sum(w / n for w, n in zip(squares, self._energy, strict=True) if n)

    def _reference_outputs(self) -> list[list[Tensor]]:
        if self._unshifted is None:
            self._unshifted = self._outputs([x.float() for x in self.samples.steps])
            self._energy = [
                sum(float(y.square().sum()) for y in outputs) for outputs in zip(*self._unshifted, strict=True)
            ]
        return self._unshifted

    def _outputs(self, inputs: list[Tensor]) -> list[list[Tensor]]:
        """Return the outputs of the float weights, by step and weight."""
        return [
            [operation(x, weight) for operation, weight in zip(self.samples.operations, self.weights, strict=True)]
            for x in inputs
        ]

    def _rotated(self, x: Tensor, result: ScalingResult) -> Tensor:
        return rotate(x, result.rotation, self.samples.channel_dim)

    def _broadcast(self, channels: Tensor) -> Tensor:
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
    """Return every step's input on the grid of least squared error; all grids are searched at once."""
    if bits >= 16:
        return steps
    lo, hi = torch.stack([torch.stack(torch.aminmax(x)) for x in steps]).unbind(1)  # [T]
    # A step with a single value needs some range for its histogram; zero is exact on any grid.
    hi = torch.where(lo < hi, hi, lo + 1)
    counts = torch.stack([torch.histc(x, BINS, float(a), float(b)) for x, a, b in zip(steps, lo, hi, strict=True)])
    found = search_histogram(counts.cpu(), lo.cpu(), hi.cpu(), bits, candidates=CANDIDATES)
    scale, zero_point = (table.to(lo.device) for table in found)
    return [fake_quantize(x, s, z, bits) for x, s, z in zip(steps, scale, zero_point, strict=True)]

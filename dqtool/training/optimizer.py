"""Adam for a quantized block: rates relative to each layer's scale, and step tables of which only some rows move.

Adam's step has the size of its learning rate whatever the gradient's, so the rate must carry the unit: weights move by
a fraction of their layer's quantization step, scales by a fraction of themselves, zero points by a fraction of a code.
All parameters of a kind live in one flat buffer, which keeps a step at a dozen tensor operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dqtool.nn.attention import OPERANDS, operand_bits
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.options import Rates

__all__ = ["QuantAdam", "cosine", "weight_unit"]

BETAS, EPS = (0.9, 0.999), 1e-12
LEARNED_SCALING_RATE = 1e-5
"""Of OmniQuant's log scale and shift, as in Table 14 of arXiv 2409.14307."""


class QuantAdam:
    """Optimizes the weights, biases, weight scales and step tables of the quantized layers in `module`, those of them that
    require gradients, and `extra` parameters, each with its own rate.

    `step(present, factor)` takes the mask `[T]` of the steps in the batch: rows of absent steps (and their moments) stay
    exactly as they are.
    """

    def __init__(self, module: nn.Module, rates: Rates, extra: Sequence[tuple[nn.Parameter, float]] = ()) -> None:
        weights: list[tuple[nn.Parameter, float]] = []
        biases: list[tuple[nn.Parameter, float]] = []
        scales: list[tuple[nn.Parameter, float]] = []
        zeros: list[tuple[nn.Parameter, float]] = []
        table_scales: dict[nn.Parameter, float] = {}
        table_zeros: dict[nn.Parameter, float] = {}
        learned: dict[nn.Parameter, float] = {}
        for layer in module.modules():
            if isinstance(layer, FakeQuantLayer):
                if layer.weight.requires_grad:
                    weights.append((layer.weight, rates.weight * weight_unit(layer)))
                if _learns(layer.bias):
                    rms = float(layer.bias.detach().square().mean().sqrt())
                    biases.append((layer.bias, rates.bias * max(rms, 1e-3)))
                if layer.learned is not None and layer.weight.requires_grad:
                    learned.update(dict.fromkeys(layer.learned.parameters(), LEARNED_SCALING_RATE))
                if _learns(layer.weight_scale):
                    scales.append((layer.weight_scale, rates.weight_scale))
                if _learns(layer.weight_zero_point) and layer.low == 0:
                    zeros.append((layer.weight_zero_point, rates.zero_point))
                if _learns(layer.input_scale):
                    table_scales[layer.input_scale] = rates.table_scale
                if _learns(layer.input_zero_point):
                    table_zeros[layer.input_zero_point] = rates.zero_point
            for operand in OPERANDS:
                scale, zero_point = (getattr(layer, f"{operand}_{kind}", None) for kind in ("scale", "zero_point"))
                if _learns(scale):
                    table_scales[scale] = rates.table_scale
                if _learns(zero_point):
                    table_zeros[zero_point] = rates.zero_point
        self.zero_limits = _zero_limits(module)
        self._groups = [
            _Group(weights, relative=False, rows=False),
            _Group(biases, relative=False, rows=False),
            _Group(scales, relative=True, rows=False),
            _Group(zeros, relative=False, rows=False),
            _Group(list(table_scales.items()), relative=True, rows=True),
            _Group(list(table_zeros.items()), relative=False, rows=True),
            _Group(list(learned.items()), relative=False, rows=False),
            _Group(extra, relative=False, rows=False),
        ]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is optimized."""
        return [parameter for group in self._groups for parameter in group.parameters]

    def zero_grad(self) -> None:
        """Forget gradients."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self, present: Tensor, factor: float = 1.0) -> None:
        """One update at `factor` times the rates; `present` is bool `[T]`."""
        for group in self._groups:
            group.step(present, factor)
        for parameter, limit in self.zero_limits:
            parameter.clamp_(0, limit)

    def release(self) -> None:
        """Give every parameter its own memory again."""
        for group in self._groups:
            group.release()

    def state(self) -> dict[str, Tensor]:
        """The parameters and their moments: all that going on takes."""
        groups = [(str(i), group) for i, group in enumerate(self._groups) if group.parameters]
        return {f"{i}.{name}": getattr(group, name) for i, group in groups for name in _Group.STATE}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave, in place."""
        for i, group in enumerate(self._groups):
            if group.parameters:
                for name in _Group.STATE:
                    getattr(group, name).copy_(state[f"{i}.{name}"])


class _Group:
    """Parameters of one kind as views of one buffer: `[n]`, or `[T, n]` for tables."""

    STATE = ("flat", "mean", "square", "count")

    def __init__(self, items: Sequence[tuple[nn.Parameter, float]], relative: bool, rows: bool) -> None:
        self.parameters = [parameter for parameter, _ in items]
        self.relative, self.rows = relative, rows
        if not items:
            return
        self.flat = self._cat([p.detach() for p in self.parameters])
        self.rate = self._cat([torch.full_like(p.detach(), rate) for p, rate in items])
        self.mean, self.square = torch.zeros_like(self.flat), torch.zeros_like(self.flat)
        self.count = self.flat.new_zeros(self.flat.shape[0], 1) if rows else self.flat.new_zeros(1)
        offset = 0
        for parameter in self.parameters:
            width = parameter[0].numel() if rows else parameter.numel()
            view = self.flat[:, offset : offset + width] if rows else self.flat[offset : offset + width]
            parameter.data = view.reshape(parameter.shape) if not rows else view.view(parameter.shape)
            offset += width

    def _cat(self, tensors: list[Tensor]) -> Tensor:
        if self.rows:
            return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1)
        return torch.cat([t.reshape(-1) for t in tensors])

    def step(self, present: Tensor, factor: float) -> None:
        if not self.parameters:
            return
        grad = self._cat([torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters])
        if self.relative:
            grad = grad.mul_(self.flat)
        mask = self.flat.new_ones(1)
        if self.rows:
            mask = (present if len(self.flat) > 1 else present.any()[None]).to(self.flat)[:, None]  # [T, 1]
        self.count += mask
        beta1, beta2 = BETAS
        self.mean += (grad - self.mean).mul_((1 - beta1) * mask)
        self.square += (grad.square() - self.square).mul_((1 - beta2) * mask)
        count = self.count.clamp(min=1)
        correction = (1 - beta2**count).sqrt() / (1 - beta1**count)
        update = self.mean / self.square.sqrt().add_(EPS) * (correction * factor * mask) * self.rate
        if self.relative:
            self.flat.mul_((-update).exp_())
        else:
            self.flat.sub_(update)

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def weight_unit(layer: FakeQuantLayer) -> float:
    """What the rates of a layer's weights are fractions of: its mean scale, or the mean size of float weights."""
    if layer.weight_scale is None:
        return float(layer.weight.detach().abs().mean())
    return float(layer.weight_scale.detach().mean())


def _learns(parameter: object) -> TypeGuard[nn.Parameter]:
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad


def cosine(step: int, total: int, floor: float = 0.0) -> float:
    """Cosine decay from 1 to `floor`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / total))


def _zero_limits(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Zero points and the largest value each may take."""
    limits: dict[nn.Parameter, int] = {}
    for layer in module.modules():
        if isinstance(layer, FakeQuantLayer):
            if isinstance(layer.weight_zero_point, nn.Parameter):
                limits[layer.weight_zero_point] = 2**layer.bits.weight - 1
            if isinstance(layer.input_zero_point, nn.Parameter):
                limits[layer.input_zero_point] = 2**layer.bits.input - 1
        for operand in OPERANDS:
            zero_point = getattr(layer, f"{operand}_zero_point", None)
            if isinstance(zero_point, nn.Parameter):
                processor = layer.processor
                limits[zero_point] = 2 ** operand_bits(operand, processor.bits, processor.probs_bits) - 1  # type: ignore
    return list(limits.items())

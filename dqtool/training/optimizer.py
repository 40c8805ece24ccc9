"""Adam for a quantized block, with rates relative to each layer's scale and step tables of which only some rows move.

An update of Adam has the size of its learning rate whatever the gradient is, so the rate must carry the unit: weights
move by a fraction of their layer's quantization step, scales by a fraction of themselves, zero points by a fraction of
a code. All parameters of a kind share one flat buffer, which keeps the number of tensor operations small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TypeGuard

import torch
from torch import Tensor, nn

from dqtool.core.device import to_device
from dqtool.graph.attention import own_processor
from dqtool.nn.attention import OPERANDS
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.options import Rates

__all__ = ["QuantAdam", "cosine", "weight_unit"]

BETAS, EPS = (0.9, 0.999), 1e-12
ALONE = 1 << 14
"""Number of values from which on a parameter is updated separately."""


class QuantAdam:
    """Optimizes the trainable parameters of the quantized layers in `module`, and the `extra` parameters with rates of
    their own.

    Weights, biases, weight scales, zero points and step tables have one rate each, see `Rates`. `step(present, factor)`
    takes the mask `[T]` of the steps in the batch: rows of other steps, and their moments, stay exactly as they are.
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
                    learned.update(dict.fromkeys(layer.learned.parameters(), layer.learned.rate))
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
        """Parameters that are optimized."""
        return [parameter for group in self._groups for parameter in group.parameters]

    def gradients(self) -> list[Tensor]:
        """Return the buffers of all gradients, one for each kind of parameter."""
        return [group.grad for group in self._groups if group.parameters]

    def zero_grad(self) -> None:
        """Set all gradients to 0."""
        for group in self._groups:
            group.zero_grad()

    @torch.no_grad()
    def step(self, present: Tensor, factor: float = 1.0) -> None:
        """Update the parameters at `factor` times the rates. `present` is the bool mask `[T]` of the steps in the
        batch."""
        for group in self._groups:
            if group.parameters:
                present = to_device(present, group.flat.device)
                group.step(present, factor)
        for parameter, limit in self.zero_limits:
            parameter.clamp_(0, limit)

    def release(self) -> None:
        """Give every parameter memory of its own again."""
        for group in self._groups:
            group.release()

    def state(self) -> dict[str, Tensor]:
        """Return the parameters and their moments, enough to resume training."""
        groups = [(str(i), group) for i, group in enumerate(self._groups) if group.parameters]
        return {f"{i}.{name}": getattr(group, name) for i, group in groups for name in _Group.STATE}

    def values(self) -> list[Tensor]:
        """Return a copy of the parameters' values, one flat tensor for each kind."""
        return [group.flat.clone() for group in self._groups if group.parameters]

    def restart(self, values: Sequence[Tensor]) -> None:
        """Set the parameters to `values`, as returned by `values()`, and reset the moments."""
        for group, flat in zip([g for g in self._groups if g.parameters], values, strict=True):
            group.flat.copy_(flat)
            for moment in (group.mean, group.square, group.count):
                moment.zero_()

    def is_finite(self) -> bool:
        """Return whether every parameter is finite."""
        return all(bool(group.flat.isfinite().all()) for group in self._groups if group.parameters)

    def values_in(self, state: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the values that a `state` of this optimizer holds, as `values()` returns them."""
        return [state[f"{i}.flat"] for i, group in enumerate(self._groups) if group.parameters]

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a state returned by `state`, in place."""
        for i, group in enumerate(self._groups):
            if group.parameters:
                for name in _Group.STATE:
                    getattr(group, name).copy_(state[f"{i}.{name}"])


class _Group:
    """Parameters of one kind as views of one flat buffer `[n]`, with their gradients in another.

    `row` holds the step of each value, for groups of step tables.
    """

    STATE = ("flat", "mean", "square", "count")

    def __init__(self, items: Sequence[tuple[nn.Parameter, float]], relative: bool, rows: bool) -> None:
        self.parameters = [parameter for parameter, _ in items]
        self.relative = relative
        if not items:
            return
        self.flat = torch.cat([p.detach().reshape(-1) for p in self.parameters])
        self.grad, self.mean, self.square = (torch.zeros_like(self.flat) for _ in range(3))
        self.row: Tensor | None = None
        if rows:
            each = [torch.arange(len(p)).repeat_interleave(p[0].numel()) for p in self.parameters]
            self.row = torch.cat(each).to(self.flat.device)
        self.count = self.flat.new_zeros(len(self.flat) if rows else 1)
        widths = [p.numel() for p in self.parameters]
        self.columns = [slice(end - width, end) for end, width in zip(accumulate(widths), widths, strict=True)]
        self.parts = _parts(self.columns, [rate for _, rate in items], self.flat)
        for parameter, where in zip(self.parameters, self.columns, strict=True):
            parameter.data = self.flat[where].view(parameter.shape)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set gradients to 0 and make them accumulate in the group's buffer."""
        if not self.parameters:
            return
        self.grad.zero_()
        for parameter, where in zip(self.parameters, self.columns, strict=True):
            parameter.grad = self.grad[where].view(parameter.shape)

    def step(self, present: Tensor, factor: float) -> None:
        mask = self.flat.new_ones(1)
        if self.row is not None:
            static = len(self.parameters[0]) == 1
            mask = (present.any()[None] if static else present).to(self.flat)[self.row]
        self.count += mask
        beta1, beta2 = BETAS
        count = self.count.clamp(min=1)
        size = (1 - beta2**count).sqrt() / (1 - beta1**count) * factor * mask
        for where, rate in self.parts:
            flat, grad, mean, square = (x[where] for x in (self.flat, self.grad, self.mean, self.square))
            here, amount = (mask, size) if len(mask) == 1 else (mask[where], size[where])
            if self.relative:
                grad.mul_(flat)
            mean += (grad - mean).mul_((1 - beta1) * here)
            square += (grad.square() - square).mul_((1 - beta2) * here)
            update = mean / square.sqrt().add_(EPS) * (amount * rate)
            if self.relative:
                flat.mul_((-update).exp_())
            else:
                flat.sub_(update)

    def release(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _parts(columns: Sequence[slice], rates: Sequence[float], like: Tensor) -> list[tuple[slice, float | Tensor]]:
    """Return the columns that are updated together, with their rates.

    A large parameter is a part by itself, so that intermediate tensors stay small. Small ones share a part, so that there are
    few operations.
    """
    parts: list[tuple[slice, float | Tensor]] = []
    small: list[tuple[slice, float]] = []

    def join() -> None:
        if small:
            each = [like.new_full((where.stop - where.start,), rate) for where, rate in small]
            parts.append((slice(small[0][0].start, small[-1][0].stop), torch.cat(each)))
            small.clear()

    for where, rate in zip(columns, rates, strict=True):
        if where.stop - where.start < ALONE:
            small.append((where, rate))
        else:
            join()
            parts.append((where, rate))
    join()
    return parts


def weight_unit(layer: FakeQuantLayer) -> float:
    """Return the unit of a layer's weight rates: its mean weight scale, or the mean magnitude of float weights."""
    if layer.weight_scale is None:
        return float(layer.weight.detach().abs().mean())
    return float(layer.weight_scale.detach().mean())


def _learns(parameter: object) -> TypeGuard[nn.Parameter]:
    """Return whether this is a parameter that requires gradients."""
    return isinstance(parameter, nn.Parameter) and parameter.requires_grad


def cosine(step: int, total: int, floor: float = 0.0) -> float:
    """Return the factor of a cosine decay from 1 at step 0 to `floor` at step `total`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * step / total))


def _zero_limits(module: nn.Module) -> list[tuple[nn.Parameter, int]]:
    """Return each zero point parameter with its largest valid value."""
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
                limits[zero_point] = 2 ** own_processor(layer).bits.of(operand) - 1
    return list(limits.items())

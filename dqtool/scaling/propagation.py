"""Propagation of a division (or a shift) of some layers' input backwards through the network, to its parameters.

`_RULES` holds one rule for each operation that a division can pass; an operation without a rule stops it. The division
of a tensor is a map from its elements to channels, so that views, slices and transposes apply to the map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.graph.recording import Op, Recording

__all__ = ["UNSCALED", "NotFoldable", "Propagation", "ShiftPropagation", "Target"]

UNSCALED = -1
"""Entry of a map of channels for a value that is not divided."""


@dataclass(frozen=True)
class Target:
    """The end of a propagation: rows of the module `name`, or the elements of a parameter if not `rows`.

    `channels` gives the in-channel whose factor divides each row or element, int64, -1 for none: `[C_out]`, or the
    parameter's shape. `offset` has the same shape: the value becomes `(value + offset)/s − offset`.
    """

    name: str
    channels: Tensor
    offset: Tensor
    rows: bool = True


class NotFoldable(Exception):
    """The division can't be moved."""


@dataclass(frozen=True)
class _Division:
    """A pending division of a tensor t: `(t + offset)/s[channels] − offset`. `channels` has the tensor's shape."""

    channels: Tensor
    offset: float = 0.0

    def through(self, change: Callable[[Tensor], Tensor]) -> _Division:
        return replace(self, channels=change(self.channels))


@dataclass
class _Targets:
    """The targets found so far."""

    found: dict[str, Target] = field(default_factory=dict)
    crosses: bool = False

    def add(self, name: str, division: _Division, rows: bool) -> None:
        channels = division.channels.long()
        offset = torch.where(channels == UNSCALED, 0.0, torch.full(channels.shape, division.offset))
        old = self.found.get(name)
        if old is not None:
            if bool(((old.channels != UNSCALED) & (channels != UNSCALED)).any()):
                raise NotFoldable
            channels = torch.where(channels == UNSCALED, old.channels, channels)
            offset = offset + old.offset
        self.found[name] = Target(name, channels, offset, rows)


class Propagation:
    """Propagation of the division of one group of layers' input."""

    shifts = False

    def __init__(self, flow: Recording, layers: Sequence[str]) -> None:
        self.flow, self.layers = flow, layers
        self.targets = _Targets()

    def run(self) -> tuple[tuple[Target, ...], bool]:
        """Return the targets, sorted by name, and whether the way to one of them crosses an attention product.

        Raises:
            NotFoldable: the division can't reach parameters.
        """
        calls = [self.flow.calls.get(name, []) for name in self.layers]
        if any(len(call) != 1 or len(call[0].args) != 1 for call in calls):
            raise NotFoldable  # a layer that never runs has no producer; one that runs twice may have two
        inputs = {id(call[0].args[0]): call[0].args[0] for call in calls}
        for x in inputs.values():
            layer = self.flow.network.get_submodule(self.layers[0])
            channel_dim = 1 if isinstance(layer, nn.Conv2d) else x.dim() - 1
            channels = torch.arange(x.shape[channel_dim], dtype=torch.int32)
            shape = [1] * x.dim()
            shape[channel_dim] = -1
            self.move(x, _Division(channels.view(shape).expand(x.shape)))
        targets = sorted(self.targets.found.values(), key=lambda target: target.name)
        return tuple(targets), self.targets.crosses

    def move(self, tensor: Tensor, division: _Division) -> None:
        """Move the division of `tensor` to its producer; raises `NotFoldable`."""
        if self.flow.is_written(tensor):
            raise NotFoldable
        self.check_readers(tensor)
        name = self.flow.parameters.get(id(tensor))
        if name is not None:
            if id(tensor) in self.flow.tied:
                raise NotFoldable
            self.targets.add(name, division, rows=False)
            return
        op = self.flow.maker(tensor)
        if op is None:
            raise NotFoldable
        if op.layer is not None:
            self.end_in_layer(op, division)
            return
        rule = _RULES.get(op.name.removeprefix("aten.").split(".")[0])
        if rule is None:
            raise NotFoldable
        rule(self, op, tensor, division)

    def check_readers(self, tensor: Tensor) -> None:
        """Raise `NotFoldable` if another operation reads the tensor.

        One reader, readers of parts that don't overlap, and the group's own layers are allowed.
        """
        others = [op for op in self.flow.reads(tensor) if op.layer not in self.layers]
        if len(others) > 1 or (others and len(others) != len(self.flow.reads(tensor))):
            spans = [_span(op) for op in others]
            parts = [span for span in spans if span is not None]
            if len(parts) != len(self.flow.reads(tensor)) or any(
                a[0] != b[0] or max(a[1], b[1]) < min(a[2], b[2]) for i, a in enumerate(parts) for b in parts[:i]
            ):
                raise NotFoldable

    def end_in_layer(self, op: Op, division: _Division) -> None:
        assert op.layer is not None
        if len(self.flow.calls[op.layer]) != 1:
            raise NotFoldable
        layer = self.flow.network.get_submodule(op.layer)
        channel_dim = 1 if isinstance(layer, nn.Conv2d) else op.outputs[0].dim() - 1
        self.end_in_rows(op.layer, division, [channel_dim], has_bias=layer.bias is not None)

    def end_in_rows(self, name: str, division: _Division, kept: Sequence[int], has_bias: bool) -> None:
        """End in a module whose out-channels lie along the `kept` dimension."""
        if any(id(p) in self.flow.tied for p in self.flow.network.get_submodule(name).parameters(recurse=False)):
            raise NotFoldable
        if (division.offset or self.shifts) and not has_bias:
            raise NotFoldable
        channels = division.channels
        for dim in range(channels.dim()):
            if dim not in kept:
                channels = _constant(channels, dim)
        self.targets.add(name, replace(division, channels=channels.flatten()), rows=True)

    def attempt(self, *choices: Callable[[], None]) -> None:
        """Take the first choice that doesn't raise `NotFoldable`; raise it if all do."""
        for choice in choices:
            before = replace(self.targets, found=dict(self.targets.found))
            try:
                return choice()
            except NotFoldable:
                self.targets = before
        raise NotFoldable


class ShiftPropagation(Propagation):
    """Propagation of a subtraction."""

    shifts = True


# Rule of each operation that a division can pass: rule(propagation, operation, output, division of that output).
_Rule = Callable[[Propagation, Op, Tensor, _Division], None]
_RULES: dict[str, _Rule] = {}


def _rule(*names: str) -> Callable[[_Rule], _Rule]:
    def add(function: _Rule) -> _Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _argument(op: Op, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of an aten operation, given by position or keyword."""
    args, kwargs = op.args[0], op.args[1] or {}
    return args[position] if position < len(args) else kwargs.get(name, default)


def _constant(channels: Tensor, dim: int) -> Tensor:
    """Return one slice along `dim` (of size 1); raises `NotFoldable` if the slices differ."""
    first = channels.narrow(dim, 0, 1)
    if channels.stride(dim) != 0 and not bool((channels == first).all()):
        raise NotFoldable
    return first


def _broadcast(division: _Division, tensor: Tensor) -> _Division:
    """Return the division of an operand that was broadcast to the division's shape."""
    channels = division.channels
    while channels.dim() > tensor.dim():
        channels = _constant(channels, 0)[0]
    for dim in range(tensor.dim()):
        if tensor.shape[dim] == 1 and channels.shape[dim] != 1:
            channels = _constant(channels, dim)
    return replace(division, channels=channels)


@_rule("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "clone", "alias", "_to_copy", "detach", "contiguous")
def _same_order(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    source = op.args[0][0]
    propagation.move(source, division.through(lambda channels: channels.reshape(source.shape)))


@_rule("transpose", "t")
def _transpose(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    source, a, b = (*op.args[0], 0, 1)[:3]
    propagation.move(source, division.through(lambda channels: channels.transpose(a, b)))


@_rule("permute")
def _permute(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    source, order = op.args[0]
    back = sorted(range(len(order)), key=lambda dim: order[dim] % len(order))
    propagation.move(source, division.through(lambda channels: channels.permute(back)))


@_rule("expand")
def _expand(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    source = op.args[0][0]
    propagation.move(source, _broadcast(division, source))


@_rule("slice", "select", "split", "split_with_sizes", "unbind")
def _part(propagation: Propagation, op: Op, output: Tensor, division: _Division) -> None:
    source = op.args[0][0]
    span = _span(op, output)
    if span is None:
        raise NotFoldable
    dim, start, stop = span

    def placed(channels: Tensor) -> Tensor:
        if channels.dim() < source.dim():
            channels = channels.unsqueeze(dim)
        # Repeated dimensions stay repeated: a large activation's map costs as much as its channels.
        for other in range(source.dim()):
            if other != dim and channels.stride(other) == 0:
                channels = channels.narrow(other, 0, 1)
        whole = channels.new_full([*channels.shape[:dim], source.shape[dim], *channels.shape[dim + 1 :]], UNSCALED)
        whole.narrow(dim, start, stop - start).copy_(channels)
        return whole.expand(source.shape)

    propagation.move(source, division.through(placed))


def _span(op: Op, output: Tensor | None = None) -> tuple[int, int, int] | None:
    """Return the part (dim, start, stop) of its first argument that an operation reads, for `output` alone if given."""
    kind = op.name.removeprefix("aten.").split(".")[0]
    if kind not in ("slice", "select", "split", "split_with_sizes", "unbind"):
        return None
    source: Tensor = op.args[0][0]
    if kind in ("slice", "select", "unbind"):
        dim = _argument(op, 1, "dim", 0) % source.dim()
    else:
        dim = _argument(op, 2, "dim", 0) % source.dim()
    size = source.shape[dim]
    if kind == "slice":
        if _argument(op, 4, "step", 1) != 1:
            return None
        start, stop, _ = slice(_argument(op, 2, "start"), _argument(op, 3, "end")).indices(size)
        return dim, start, stop
    if kind == "select":
        index = _argument(op, 2, "index") % size
        return dim, index, index + 1
    if output is None:
        return dim, 0, size
    position = next(i for i, part in enumerate(op.outputs) if part is output)
    if kind == "unbind":
        return dim, position, position + 1
    start = sum(part.shape[dim] for part in op.outputs[:position])
    return dim, start, start + output.shape[dim]


@_rule("cat")
def _cat(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    parts, dim, start = op.args[0][0], _argument(op, 1, "dim", 0), 0
    for part in parts:
        channels = division.channels.narrow(dim, start, part.shape[dim])
        start += part.shape[dim]
        propagation.move(part, replace(division, channels=channels))


@_rule("add", "sub")
def _add(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    """Divide both terms; a constant moves into the offset: `(t + k + c)/s − c − k` is t with offset `c + k`."""
    sign = -1 if "sub" in op.name else 1
    first, second = op.args[0][:2]
    if _argument(op, 2, "alpha", 1) != 1:
        raise NotFoldable
    if propagation.shifts:
        choices = [lambda: propagation.move(first, _broadcast(division, first))]
        if isinstance(second, Tensor) and sign > 0:
            choices.append(lambda: propagation.move(second, _broadcast(division, second)))
        propagation.attempt(*choices)
        return
    if not isinstance(second, Tensor):
        propagation.move(first, replace(division, offset=division.offset + sign * second))
        return
    if not isinstance(first, Tensor):
        raise NotFoldable
    propagation.move(first, _broadcast(division, first))
    propagation.move(second, _broadcast(replace(division, offset=0.0), second))


@_rule("mul", "div")
def _mul(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    """Divide one factor, the first that can be divided; the offset passes a constant."""
    first, second = op.args[0][:2]
    divides = "div" in op.name
    if propagation.shifts:
        raise NotFoldable
    if not isinstance(second, Tensor) or second.dim() == 0 or _is_scalar(propagation, second):
        if division.offset:
            if isinstance(second, Tensor) or second == 0:
                raise NotFoldable
            division = replace(division, offset=division.offset * second if divides else division.offset / second)
        propagation.move(first, division)
        return
    if division.offset:
        raise NotFoldable
    choices: list[Callable[[], None]] = [lambda: propagation.move(first, _broadcast(division, first))]
    if not divides:
        choices.append(lambda: propagation.move(second, _broadcast(division, second)))
    propagation.attempt(*choices)


def _is_scalar(propagation: Propagation, tensor: Tensor) -> bool:
    return tensor.numel() == 1 and id(tensor) not in propagation.flow.parameters


@_rule("relu")
def _relu(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    """Divide the input: `relu(x)/s = relu(x/s)` for positive s."""
    if division.offset or propagation.shifts:
        raise NotFoldable
    propagation.move(op.args[0][0], division)


@_rule("native_group_norm", "native_layer_norm")
def _norm(propagation: Propagation, op: Op, output: Tensor, division: _Division) -> None:
    """Divide the affine; the normalized value before it can't be divided."""
    grouped = "group" in op.name
    weight, bias = (op.args[0][1], op.args[0][2]) if grouped else (op.args[0][2], op.args[0][3])
    if weight is None or output is not op.outputs[0] or (not grouped and len(op.args[0][1]) != 1):
        raise NotFoldable
    for affine in (weight, bias):
        if affine is not None and (
            id(affine) not in propagation.flow.parameters or len(propagation.flow.reads(affine)) != 1
        ):
            raise NotFoldable
    name = propagation.flow.parameters[id(weight)].rpartition(".")[0]
    propagation.end_in_rows(name, division, [1 if grouped else output.dim() - 1], has_bias=bias is not None)


@_rule("bmm")
def _bmm(propagation: Propagation, op: Op, _output: Tensor, division: _Division) -> None:
    """Divide v, since `out[.., k] = Σ p·v[.., k]`."""
    _product(propagation, op.args[0][1], division)


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
def _attention(propagation: Propagation, op: Op, output: Tensor, division: _Division) -> None:
    if output is not op.outputs[0]:
        raise NotFoldable
    _product(propagation, op.args[0][2], division)


def _product(propagation: Propagation, value: Tensor, division: _Division) -> None:
    if division.offset or propagation.shifts or len(value.shape) != len(division.channels.shape):
        raise NotFoldable
    channels = _constant(division.channels, -2).expand(value.shape)
    propagation.targets.crosses = True
    propagation.move(value, replace(division, channels=channels))

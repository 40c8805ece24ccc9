"""A packed network rewritten in plain operations that graph compilers map to integer kernels.

The step tables are part of the network: `timestep` finds its row, and everything per step is a multiplier before and
after an ordinary int8 product with a constant zero point (`traceable_codes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from dqtool.core.rotation import rotate
from dqtool.graph.attention import own_processor
from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.integer import integer_attention, integer_layer
from dqtool.nn.packed_layer import PackedLayer
from dqtool.nn.prediction import NAME as PREDICTION
from dqtool.nn.prediction import PredictionTables, correct_hook, corrected, is_correcting
from dqtool.nn.processors import set_own
from dqtool.nn.steps import step_hook, time_argument
from dqtool.nn.traceable_codes import OperandCodes, ProductForm, StepTables, is_signed, largest_code, multiply

__all__ = ["TraceableLayer", "TraceableNetwork", "flat_arguments", "flat_leaves", "nested_arguments"]


class TraceableLayer(nn.Module):
    """A packed convolution or linear layer in plain operations."""

    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None
    divisor: Tensor | None
    correction: Tensor | None

    def __init__(self, layer: PackedLayer, tables: StepTables, product: ProductForm) -> None:
        super().__init__()
        form = integer_layer(layer)
        self.form, self.product = form, product
        marks = product if form.is_integer else None
        self.codes = None if form.input is None else OperandCodes(form.input, tables, marks)
        self.register_buffer("weight", form.weight)
        self.register_buffer("weight_scale", form.weight_scale)
        self.register_buffer("bias", form.bias)
        self.register_buffer("divisor", form.divisor)
        correction = None
        if form.weight_scale is not None and not is_signed(form):
            correction = form.weight_sum * form.weight_scale
        self.register_buffer("correction", correction)
        self.low_rank = form.low_rank

    def forward(self, input: Tensor, *_: object) -> Tensor:
        """Return the float output of the replaced layer for a float input."""
        product = self._product(input)
        return product if self.low_rank is None else product + self.low_rank(input)

    def _product(self, x: Tensor) -> Tensor:
        form = self.form
        along = (-1, 1, 1) if form.is_conv else (-1,)  # out-channels, against the output
        if self.codes is None:
            x = rotate(x, form.rotation, 1 if form.is_conv else -1)
            x = x if self.divisor is None else x * self.divisor.reciprocal().view(along)
            weight = self.weight
            if self.weight_scale is not None:
                weight = weight.to(torch.float32) * self.weight_scale.view(-1, *(1,) * (weight.dim() - 1))
            return multiply(x, weight, form, self.bias)
        scalar = (-1, *(1,) * (x.dim() - 1))
        codes = self.quantize(x)
        if self.weight_scale is None:
            y = multiply(codes, self.weight, form, None)
        else:
            y = self.product.layer(codes, self.weight, self.weight_scale, form)
        scale = self.codes.slot(self.codes.scale, scalar)
        y = y * scale
        if self.correction is not None:
            y = y - self.codes.slot(self.codes.zero_point, scalar) * scale * self.correction.view(along)
        return y if self.bias is None else y + self.bias.view(along)

    def quantize(self, x: Tensor) -> Tensor:
        """Return the input's codes for the product; padded for a convolution on unsigned codes."""
        assert self.codes is not None
        form, width = self.form, 1 if self.divisor is None else self.divisor.numel()
        if form.rotation:  # once for all layers that read the input
            size, dim, given = form.rotation, 1 if form.is_conv else -1, x
            x = self.codes.tables.made((id(x), "rotated", size, dim), x, lambda: rotate(given, size, dim))
        if not form.is_conv:
            return self.codes(x, (-1, *(1,) * (x.dim() - 2), width))
        padded = not is_signed(form) and self.weight_scale is not None
        return self.codes(x, (-1, width, 1, 1), (form.padding[1],) * 2 + (form.padding[0],) * 2 if padded else ())


class TraceableAttention(QuantAttnProcessor):
    """Attention processor of a packed network with both products on marked codes.

    Everything but the products is inherited from `QuantAttnProcessor`.
    """

    def __init__(self, attn: nn.Module, tables: StepTables, product: ProductForm) -> None:
        processor: QuantAttnProcessor = own_processor(attn)
        super().__init__(processor.bits, processor.steps, processor.layout)
        form = integer_attention(attn)
        self.product = product
        self.codes: dict[str, OperandCodes] = {}
        for left, right in (("q", "k"), ("probs", "v")):
            ours = {name: form.operands[name] for name in (left, right) if name in form.operands}
            exact = len(ours) < 2 or product.fits(ours[left], largest_code(ours[right]))
            # In float32 these products are exact too: their sums stay below 2^24.
            self.codes |= {name: OperandCodes(o, tables, product if exact else None) for name, o in ours.items()}

    def scores(self, attn: nn.Module, query: Tensor, key: Tensor) -> Tensor:
        """Return `q·kᵀ`, multiplied on codes where both operands are quantized."""
        return self._multiply("q", query, "k", key, transpose=True)

    def weigh(self, attn: nn.Module, probs: Tensor, value: Tensor) -> Tensor:
        """Return `softmax·v`, multiplied on codes where both operands are quantized."""
        return self._multiply("probs", probs, "v", value, transpose=False)

    def _multiply(self, left: str, a: Tensor, right: str, b: Tensor, transpose: bool) -> Tensor:
        ours = [self.codes.get(name) for name in (left, right)]
        a, b = (x if codes is None else codes(x, codes.rows) for codes, x in zip(ours, (a, b), strict=True))
        b = b.transpose(-1, -2) if transpose else b
        y = a @ b if ours[0] is None or ours[1] is None else self.product.matmul(a, b, ours[0].signed)
        for codes in ours:
            if codes is not None:
                y = y * codes.slot(codes.scale, codes.rows)
        return y


class TraceableGroupNorm(nn.Module):
    """Group norm as one multiply-add per channel, from channel means and square sums.

    Unlike the usual form it never views channels as groups. A channels-last compiler therefore keeps its layout and fuses
    the following activation and quantizer.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.channels, self.eps = norm.num_groups, norm.num_channels, norm.eps
        self.affine = norm.affine
        if norm.affine:
            self.weight = nn.Buffer(norm.weight.detach().view(1, norm.num_groups, -1))
            self.bias = nn.Buffer(norm.bias.detach().view(1, norm.num_groups, -1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x` `[N, C, ...]` as `nn.GroupNorm` does."""
        dims = tuple(range(2, x.dim()))
        grouped = (-1, self.groups, self.channels // self.groups)
        mean = x.mean(dims).view(grouped).mean(2, keepdim=True)  # [N, G, 1]
        positions = x.shape[2]
        for dim in dims[1:]:
            positions = positions * x.shape[dim]  # not `numel`: a tracer takes that for a constant
        square = torch.linalg.vector_norm(x, 2, dims).square() / positions
        variance = square.view(grouped).mean(2, keepdim=True) - mean.square()
        variance = variance.clamp(min=0)  # a difference of large numbers, where the mean is far from zero
        scale = torch.rsqrt(variance + self.eps)
        scale = scale * self.weight if self.affine else scale.expand(-1, -1, grouped[2])  # [N, G, C / G]
        shift = self.bias - mean * scale if self.affine else -mean * scale
        along = (-1, self.channels, *(1,) * len(dims))
        return x * scale.reshape(along) + shift.reshape(along)


class TraceableNetwork(nn.Module):
    """A packed network in plain operations, called with flat tensors. Rewrites `packed` in place.

    `names` lists the arguments in order, named as by `flat_arguments`; what is no tensor in `example` is part of the graph.
    The time is `[1]`, or `[N]` for mixed steps. A call returns a tuple of the network's outputs, the first as one tensor.
    """

    def __init__(
        self, packed: nn.Module, example: Mapping[str, Any], product: ProductForm | None = None, sample: str = "sample"
    ) -> None:
        super().__init__()
        product = product or ProductForm()
        self.names = list(flat_arguments(example))
        self.constants = {name: leaf for name, leaf in flat_leaves(example).items() if not isinstance(leaf, Tensor)}
        self.time = time_argument(type(packed).forward)[0]
        self.sample = sample
        self.tables = StepTables(packed.timesteps)  # type: ignore[arg-type]
        for key, hook in list(packed._forward_pre_hooks.items()):
            if hook is step_hook:
                del packed._forward_pre_hooks[key], packed._forward_pre_hooks_with_kwargs[key]
        self.prediction = self._take_prediction(packed)
        made: dict[nn.Module, nn.Module] = {}
        for name, module in list(packed.named_modules(remove_duplicate=False)):
            if isinstance(own_processor(module), QuantAttnProcessor) and module not in made:
                made[module] = module
                set_own(module, TraceableAttention(module, self.tables, product))
            elif isinstance(module, PackedLayer) and module not in made:
                made[module] = TraceableLayer(module, self.tables, product)
            elif isinstance(module, nn.GroupNorm) and product.folds_norms and module not in made:
                made[module] = TraceableGroupNorm(module)
            if made.get(module, module) is not module:  # replace it under all its names: some networks repeat a module
                parent, _, leaf = name.rpartition(".")
                setattr(packed.get_submodule(parent), leaf, made[module])
        self.tables.freeze()
        self.network = packed

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Return the network's outputs for `tensors`, given in the order of `names`."""
        arguments = nested_arguments(self.constants | dict(zip(self.names, tensors, strict=True)))
        self.tables.enter(arguments[self.time])
        sample = arguments[self.sample]
        sample = sample if isinstance(sample, Tensor) else torch.stack(sample)
        arguments[self.time] = arguments[self.time].expand(sample.shape[0])
        try:
            outputs = self.network(**arguments, return_dict=False)
            first, *more = (outputs,) if isinstance(outputs, Tensor) else outputs
            first = first if isinstance(first, Tensor) else torch.stack(first)
            return (first if self.prediction is None else self._corrected(first, sample), *more)
        finally:
            self.tables.leave()

    def _take_prediction(self, packed: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]] | None:
        """Remove the prediction correction's hook and return slot and row shape of each of its tables, by name.

        Returns None for a network that does not correct its predictions, or whose correction is switched off.
        """
        for key, hook in list(packed._forward_hooks.items()):
            if hook is correct_hook:
                del packed._forward_hooks[key], packed._forward_hooks_with_kwargs[key]
                if not is_correcting(packed):
                    return None
                tables: PredictionTables = getattr(packed, PREDICTION)
                return {name: (self.tables.add(t), tuple(t.shape[1:])) for name, t in tables.tables().items()}
        return None

    def _corrected(self, prediction: Tensor, sample: Tensor) -> Tensor:
        assert self.prediction is not None
        now = {name: self.tables._now[slot].view(-1, *row) for name, (slot, row) in self.prediction.items()}
        return corrected(prediction, sample, now)


def flat_arguments(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors among a network's keyword arguments by name, in order: `a.b` is entry b of a dict, `a.0` the first
    entry of a list or tuple."""
    return {name: leaf for name, leaf in flat_leaves(arguments).items() if isinstance(leaf, Tensor)}


def flat_leaves(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything among a network's keyword arguments as `flat_arguments` does; an empty list or dict is a leaf."""
    leaves, _ = tree_flatten_with_path(
        dict(arguments), is_leaf=lambda value: isinstance(value, list | dict) and not value
    )
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path): leaf for path, leaf in leaves
    }


def nested_arguments(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inverse of `flat_leaves`. Tuples come back as lists."""
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *outer, leaf = name.split(".")
        holder = arguments
        for key in outer:
            holder = holder.setdefault(key, {})
        holder[leaf] = tensor
    return {name: _with_lists(value) for name, value in arguments.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    entries = {key: _with_lists(each) for key, each in value.items()}
    return list(entries.values()) if entries and all(key.isdigit() for key in entries) else entries

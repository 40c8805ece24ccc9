"""A packed network rewritten in plain operations that graph compilers map to integer kernels (ALGORITHM.md, section 6).

The step tables are part of the network: `timestep` finds its row, and everything per step is a multiplier before and
after an ordinary int8 product with a constant zero point. A quantized operand becomes multiply, round, clip, and a
fake-quantize on the constant grid -128..127 (0..255 for unsigned codes), which says "int8" to a compiler and changes
nothing; a weight is an int8 constant, converted and multiplied with its scale. Compilers recognise both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from dqtool.nn.attention import QuantAttnProcessor
from dqtool.nn.integer import IntegerLayer, Operand, integer_attention, integer_layer
from dqtool.nn.layers import PackedLayer
from dqtool.nn.prediction import NAME as PREDICTION
from dqtool.nn.prediction import PredictionTables, correct_hook, corrected
from dqtool.nn.steps import nearest_rows, step_hook

__all__ = [
    "OperandCodes",
    "ProductForm",
    "StepTables",
    "TraceableLayer",
    "TraceableNetwork",
    "flat_arguments",
    "nested_arguments",
]


class ProductForm:
    """Form in which integer products are written into the graph. Engines override it for their compiler.

    With `folds_norms` group norms become `TraceableGroupNorm`.
    """

    folds_norms = False

    def fits(self, left: Operand, right: int) -> bool:
        """Return whether the engine's sums are exact for codes of `left` times int8 codes of magnitude up to `right`."""
        return True

    def mark(self, codes: Tensor, signed: bool) -> Tensor:
        """Return `codes` (integers in float) with a fake-quantize operation that marks them as int8 or uint8."""
        low, high = (-128, 127) if signed else (0, 255)
        return torch.fake_quantize_per_tensor_affine(codes, 1.0, 0, low, high)

    def layer(self, codes: Tensor, weight: Tensor, weight_scale: Tensor, layer: IntegerLayer) -> Tensor:
        """Return `weight_scale_j * sum(c * w)` of a convolution or linear layer; unsigned codes are padded already."""
        w = weight.to(torch.float32) * weight_scale.view(-1, *(1,) * (weight.dim() - 1))
        return multiply(codes, w, layer, None, padded=not is_signed(layer))

    def matmul(self, a: Tensor, b: Tensor, signed: bool) -> Tensor:
        """Return the product of two marked attention operands; `signed` says whether `a` is signed, and `b` always is."""
        return a @ b


class StepTables(nn.Module):
    """The tables of all layers side by side, so that one gather per call serves the whole network.

    A slot is `[n, width]` during a call: `n` is 1, or the batch where samples are at different steps.
    """

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        self.timesteps = nn.Buffer(timesteps.detach().to(torch.float32))
        self.table = nn.Buffer(torch.empty(0))
        self.divisors = nn.Buffer(torch.empty(0))
        self.owners = nn.Buffer(torch.empty(0, dtype=torch.long))
        self._columns: list[Tensor] = []
        self._divided: list[tuple[int, Tensor]] = []  # (column of the scale, divisor)
        self._known: dict[bytes, int] = {}
        self._now: list[Tensor] = []
        self._now_divided: list[Tensor] = []
        self._made: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def add(self, table: Tensor) -> int:
        """Reserve a slot for `table` `[T]` or `[T, width]` (or one static row) and return its index; equal tables share one."""
        rows = table.detach().to(torch.float32).reshape(table.shape[0], -1).expand(len(self.timesteps), -1).contiguous()
        key = rows.numpy().tobytes()
        if key not in self._known:
            self._known[key] = len(self._columns)
            self._columns.append(rows)
        return self._known[key]

    def add_divided(self, scale: Tensor, divisor: Tensor) -> int:
        """Reserve a slot for the multipliers `1 / (scale_t * divisor_k)` `[n, K]` and return its index.

        They are computed in each call, because tables of them would be K times larger.
        """
        key = b"divided" + scale.numpy().tobytes() + divisor.numpy().tobytes()
        if key not in self._known:
            self._known[key] = len(self._divided)
            self._divided.append((self.add(scale), divisor.detach().to(torch.float32)))
        return self._known[key]

    def freeze(self) -> None:
        """Lay the tables out in memory; no slot can be added afterwards."""
        starts, at = [], 0
        for column in self._columns:
            starts.append(at)
            at += column.shape[1]
        if self._columns:
            self.table = nn.Buffer(torch.cat(self._columns, 1))
        if self._divided:
            self.divisors = nn.Buffer(torch.cat([divisor for _, divisor in self._divided]))
            self.owners = nn.Buffer(
                torch.cat([torch.full((len(divisor),), starts[column]) for column, divisor in self._divided])
            )

    def enter(self, timestep: Tensor) -> None:
        """Gather the rows nearest to `timestep` `[n]`."""
        self._made = {}
        rows = nearest_rows(timestep.to(torch.float32), self.timesteps)
        if not self._columns:
            return
        row = self.table[rows]  # [n, all widths]
        self._now = list(row.split([column.shape[1] for column in self._columns], 1))
        if self._divided:
            multipliers = torch.ones(1) / (row[:, self.owners] * self.divisors)
            self._now_divided = list(multipliers.split([divisor.numel() for _, divisor in self._divided], 1))

    def leave(self) -> None:
        """Release the rows and codes of this call."""
        self._now, self._now_divided, self._made = [], [], {}


class OperandCodes:
    """Quantizer of one operand in the graph: turns it into marked codes by the rows of its slots.

    Layers that share an input and its quantizer (q, k, v) share codes, which are computed once per call. Without a
    `product` codes are not marked: they are centred integers in float, of any width.
    """

    def __init__(self, operand: Operand, tables: StepTables, product: ProductForm | None) -> None:
        self.signed, self.divided = operand.signed or product is None, operand.divisor is not None
        self.tables, self.product = tables, product
        if operand.divisor is None:
            self.multiplier = tables.add(operand.multipliers())
        else:
            self.multiplier = tables.add_divided(operand.scale, operand.divisor)
        self.static_zero = bool((operand.zero_point == operand.zero_point.flatten()[0]).all())
        self.bounds = (int(operand.low.flatten()[0]), int(operand.high.flatten()[0]))
        self.low, self.high = tables.add(operand.low), tables.add(operand.high)
        self.scale, self.zero_point = tables.add(operand.scale), tables.add(operand.zero_point)
        self.rows = (-1, operand.scale[0].numel(), 1, 1)  # per-head tables against [N, H, S, D]

    def slot(self, slot: int, shape: tuple[int, ...]) -> Tensor:
        """Return the slot's rows of the current call, viewed as `shape`."""
        return self.tables._now[slot].view(shape)

    def __call__(self, x: Tensor, shape: tuple[int, ...], pad: tuple[int, ...] = ()) -> Tensor:
        """Return the codes of `x`: centred if `signed`, else stored codes.

        `shape` views rows `[n, width]` so that they broadcast against `x`. `pad` pads `x` with real zeros first, since
        unsigned codes can't be padded with zero afterwards.
        """
        key = (id(x), self.multiplier, self.divided, self.low, self.high, self.signed, self.product is None, pad)
        if key not in self.tables._made:
            self.tables._made[key] = (x, self._codes(F.pad(x, pad) if any(pad) else x, shape))
        return self.tables._made[key][1]

    def _codes(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        source = self.tables._now_divided if self.divided else self.tables._now
        scalar = (shape[0], *(1,) * (len(shape) - 1)) if self.divided else shape
        codes = (x * source[self.multiplier].view(shape)).round()
        if self.static_zero:
            codes = codes.clamp(*self.bounds)
        else:
            codes = torch.maximum(codes, self.slot(self.low, scalar))
            codes = torch.minimum(codes, self.slot(self.high, scalar))
        if not self.signed:
            codes = codes + self.slot(self.zero_point, scalar)
        return codes if self.product is None else self.product.mark(codes, self.signed)


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

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Return the float output of the replaced layer for a float input."""
        product = self._product(x)
        return product if self.low_rank is None else product + self.low_rank(x)

    def _product(self, x: Tensor) -> Tensor:
        form = self.form
        along = (-1, 1, 1) if form.is_conv else (-1,)  # out-channels, against the output
        if self.codes is None:
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
        if not form.is_conv:
            return self.codes(x, (-1, *(1,) * (x.dim() - 2), width))
        padded = not is_signed(form) and self.weight_scale is not None
        return self.codes(x, (-1, width, 1, 1), (form.padding[1],) * 2 + (form.padding[0],) * 2 if padded else ())


class TraceableAttention(QuantAttnProcessor):
    """Attention processor of a packed network with both products on marked codes.

    Everything but the products is inherited from `QuantAttnProcessor`.
    """

    def __init__(self, attn: nn.Module, tables: StepTables, product: ProductForm) -> None:
        processor: QuantAttnProcessor = attn.processor  # type: ignore[assignment]
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

    `names` lists the arguments in order, named as by `flat_arguments`. `timestep` is `[1]`, or `[N]` for mixed steps.
    A call returns a tuple of the network's outputs.
    """

    def __init__(
        self, packed: nn.Module, example: Mapping[str, Any], product: ProductForm | None = None, sample: str = "sample"
    ) -> None:
        super().__init__()
        product = product or ProductForm()
        self.names = list(flat_arguments(example))
        self.sample = sample
        self.tables = StepTables(packed.timesteps)  # type: ignore[arg-type]
        for key, hook in list(packed._forward_pre_hooks.items()):
            if hook is step_hook:
                del packed._forward_pre_hooks[key], packed._forward_pre_hooks_with_kwargs[key]
        self.prediction = self._take_prediction(packed)
        made: dict[nn.Module, nn.Module] = {}
        for name, module in list(packed.named_modules(remove_duplicate=False)):
            if isinstance(getattr(module, "processor", None), QuantAttnProcessor) and module not in made:
                made[module] = module
                module.set_processor(TraceableAttention(module, self.tables, product))
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
        arguments = nested_arguments(dict(zip(self.names, tensors, strict=True)))
        self.tables.enter(arguments["timestep"])
        batch = arguments[self.sample].shape[0]
        arguments["timestep"] = arguments["timestep"].expand(batch)
        try:
            outputs: tuple[Tensor, ...] = self.network(**arguments, return_dict=False)
            if self.prediction is None:
                return outputs
            return (self._corrected(outputs[0], arguments[self.sample]), *outputs[1:])
        finally:
            self.tables.leave()

    def _take_prediction(self, packed: nn.Module) -> dict[str, tuple[int, tuple[int, ...]]] | None:
        """Remove the prediction correction's hook and return slot and row shape of each of its tables, by name.

        Returns None for a network that does not correct its predictions.
        """
        for key, hook in list(packed._forward_hooks.items()):
            if hook is correct_hook:
                del packed._forward_hooks[key], packed._forward_hooks_with_kwargs[key]
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
    leaves, _ = tree_flatten_with_path(dict(arguments))
    return {
        ".".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path): leaf
        for path, leaf in leaves
        if isinstance(leaf, Tensor)
    }


def nested_arguments(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the inverse of `flat_arguments`. Tuples come back as lists."""
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


def largest_code(operand: Operand) -> int:
    """Return the largest magnitude of an operand's centred codes."""
    return int(torch.maximum(-operand.low, operand.high).max())


def is_signed(layer: IntegerLayer) -> bool:
    """Return whether the layer's input codes are centred."""
    return layer.input is None or layer.input.signed


def multiply(x: Tensor, weight: Tensor, layer: IntegerLayer, bias: Tensor | None, padded: bool = False) -> Tensor:
    """Return the float convolution or linear product with a layer's geometry; with `padded`, `x` is padded already."""
    if not layer.is_conv:
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, layer.stride, 0 if padded else layer.padding, layer.taps_dilation, layer.groups)

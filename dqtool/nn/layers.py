"""Quantized Conv2d and Linear: what both forms share, and `FakeQuantLayer`, the form that trains.

The form that ships is `dqtool.nn.packed_layer.PackedLayer`. Both use the tensor names of the artifact (`X.weight_scale`,
`X.input_scale` `[T]`, `X.dilation` `[C_in]`, ...) and share one forward, so a shipped layer is bit-identical to the trained
one. The simulation of the shipped form is the reference for integer runtimes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool.core.affine import SYMMETRIC_BITS, fake_quantize, lowest_code
from dqtool.core.bits import LayerBits
from dqtool.core.dilation import broadcast_scale
from dqtool.core.packing import pack
from dqtool.core.rotation import rotate, rotate_weight
from dqtool.graph.leaves import zero_padding
from dqtool.nn.branch import BRANCH, LowRankBranch
from dqtool.nn.quantizers import quantize_operand
from dqtool.nn.steps import StepIndex

__all__ = [
    "FakeQuantLayer",
    "InputTransform",
    "QuantLayer",
    "WeightAdapter",
    "multiply_shared",
]


class QuantLayer(nn.Module):
    """Base class of both forms: geometry of the product, and the input's quantizer.

    Tensors: `input_scale`, `input_zero_point` `[T]` (absent when the input stays float), `dilation` `[C_in]` (absent
    when 1), `bias` `[C_out]` or None. `low_rank` is a float branch beside the product, or None. `rotation` is the group size
    of the input's rotation, which comes before its division; 0 for none.
    """

    input_scale: Tensor | None
    input_zero_point: Tensor | None
    dilation: Tensor | None
    bias: Tensor | None
    low_rank: LowRankBranch | None
    rotation: int

    def __init__(self, like: nn.Module, bits: LayerBits, steps: StepIndex) -> None:
        super().__init__()
        self.bits, self.steps = bits, steps
        self.rotation = 0
        self.is_conv = isinstance(like, nn.Conv2d)
        if isinstance(like, nn.Conv2d):
            padding = zero_padding(like)
            if padding is None:
                raise TypeError(f"padding {like.padding!r} with {like.padding_mode} has no integer form")
            self.padding = padding
            self.stride, self.dilation_taps, self.groups = like.stride, like.dilation, like.groups
            self.in_channels, self.out_channels = like.in_channels, like.out_channels
            self.kernel_size = like.kernel_size
        elif isinstance(like, nn.Linear):
            self.groups = 1
            self.in_features, self.out_features = like.in_features, like.out_features
        else:
            raise TypeError(f"{type(like).__name__} is neither Conv2d nor Linear")
        self.low = lowest_code(bits.weight, symmetric=True)
        self.low_rank = None

    @property
    def geometry(self) -> tuple[Any, ...] | None:
        """Return (stride, padding, dilation of the taps) of a convolution, None for a linear layer."""
        return (self.stride, self.padding, self.dilation_taps) if self.is_conv else None

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the fake-quantized `x / dilation`, `[N, C, H, W]` or `[N, ..., C]` like `x`, the input of `multiply`.

        `x` is rotated first if the layer has a rotation.
        """
        if self.input_scale is None or self.input_zero_point is None:
            return self.transform_input(x)
        x, divisor = self.rotate_input(x), self._input_divisor()
        return quantize_operand(
            x, self.input_scale, self.input_zero_point, self.steps.rows_for(x), self.bits.input, 0, divisor
        )

    def transform_input(self, x: Tensor) -> Tensor:
        """Return the rotated and divided input, which `quantize_input` rounds."""
        x, divisor = self.rotate_input(x), self._input_divisor()
        return x if divisor is None else x * divisor.reciprocal()

    def rotate_input(self, x: Tensor) -> Tensor:
        """Return the input with its channels rotated, if the layer has a rotation."""
        return rotate(x, self.rotation, 1 if self.is_conv else -1)

    def _input_divisor(self) -> Tensor | None:
        """Return `input_divisor` in a shape that divides the input."""
        divisor = self.input_divisor()
        return divisor.view(-1, 1, 1) if divisor is not None and self.is_conv else divisor

    def input_divisor(self) -> Tensor | None:
        """Return the divisor of the input's channels, `[C_in]`; None for a layer without one."""
        return self.dilation

    def quantized_weight(self) -> Tensor:
        """Return the dequantized weight, `[C_out, C_in/groups, kh, kw]` or `[C_out, C_in]`."""
        raise NotImplementedError

    def float_weight(self) -> Tensor:
        """Return the float layer's weight with the quantized values: dilation and rotation undone, the branch added."""
        weight = self.quantized_weight()
        if self.dilation is not None:
            weight = weight / broadcast_scale(self.dilation, weight, self.groups)
        weight = rotate_weight(weight, self.rotation)
        return weight if self.low_rank is None else weight + self.low_rank.weight()

    def multiply(self, x: Tensor) -> Tensor:
        """Return the product without bias; `x` comes from `quantize_input` of this layer or of one that shares its input."""
        weight, bias = self.quantized_weight(), self.output_bias()
        if self.is_conv:
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation_taps, self.groups)
        return F.linear(x, weight, bias)

    def output_bias(self) -> Tensor | None:
        """Return the bias that is added to the product, `[C_out]`."""
        return self.bias

    def forward(self, input: Tensor, *_: object) -> Tensor:
        """Quantize the input, multiply and add the bias in float32; the result has the dtype of `input`.

        Extra arguments (diffusers' old `scale`) are ignored.
        """
        return self.add_branch(self.multiply(self.quantize_input(input.float())), input).to(input.dtype)

    def add_branch(self, product: Tensor, x: Tensor) -> Tensor:
        """Return the product plus the low-rank branch of the layer's own input `x`, if there is a branch."""
        return product if self.low_rank is None else product + self.low_rank(x)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"bits={self.bits.weight}/{self.bits.input}"


class WeightAdapter(nn.Module):
    """Parametrization of a layer's weight while a training method learns it (rounding, low-rank updates)."""

    def quantized_weight(self, layer: FakeQuantLayer) -> Tensor:
        """Return the quantized weight of `layer`, with gradients for the adapter's parameters."""
        raise NotImplementedError

    def merge(self, layer: FakeQuantLayer) -> None:
        """Write the adapted weight into `layer.weight` and remove the adapter; the quantized weight stays the same."""
        raise NotImplementedError


class InputTransform(nn.Module):
    """A learnable scale and shift of a layer's input that leave the float layer's function unchanged.

    `rate` is the learning rate of its parameters. Layers that share an input share the transform.
    """

    rate: float

    def move(self, x: Tensor, is_conv: bool) -> Tensor:
        """Return the shifted input, `[N, C, H, W]` (convolutions) or `[N, ..., C]`."""
        raise NotImplementedError

    def widen(self, dilation: Tensor | None) -> Tensor:
        """Return the divisor of the input's channels, `[C_in]`, given the layer's fixed `dilation`."""
        raise NotImplementedError

    def multiply(self, weight: Tensor, groups: int) -> Tensor:
        """Return the weight for the transformed input."""
        raise NotImplementedError

    def restore(self, bias: Tensor, weight: Tensor, dilation: Tensor | None, groups: int) -> Tensor:
        """Return the bias with the contribution that the shift removed; `weight` is already dilated."""
        raise NotImplementedError


class FakeQuantLayer(QuantLayer):
    """The trainable form: float `weight` (already dilated), `weight_scale`, `weight_zero_point` `[C_out]` as parameters."""

    weight_scale: Tensor | None
    weight_zero_point: Tensor | None
    learned: InputTransform | None
    """Learnable scale and shift of the input; None outside of training."""
    adapter: WeightAdapter | None
    """Parametrization of the weight that a training method learns; None outside of training."""

    def __init__(self, like: nn.Module, bits: LayerBits, steps: StepIndex) -> None:
        super().__init__(like, bits, steps)
        self.weight = nn.Parameter(like.weight.detach().clone())  # type: ignore[operator]
        bias = like.bias
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))  # type: ignore[operator]
        for name in ("weight_scale", "weight_zero_point", "input_scale", "input_zero_point"):
            self.register_parameter(name, None)
        self.register_buffer("dilation", None)
        self.register_module("learned", None)
        self.register_module("adapter", None)

    def quantize_input(self, x: Tensor) -> Tensor:
        """Return the fake-quantized input as the base class does, after the shift of `learned`."""
        return super().quantize_input(x if self.learned is None else self.learned.move(x, self.is_conv))

    def input_divisor(self) -> Tensor | None:
        """Return the base class's divisor times the scale of `learned`."""
        return self.dilation if self.learned is None else self.learned.widen(self.dilation)

    def output_bias(self) -> Tensor | None:
        """Return the base class's bias plus the contribution of the shift of `learned`."""
        if self.learned is None or self.bias is None:
            return self.bias
        return self.learned.restore(self.bias, self.weight, self.dilation, self.groups)

    def quantized_weight(self) -> Tensor:
        """Return the fake-quantized weight, with gradients."""
        if self.adapter is not None:
            return self.adapter.quantized_weight(self)
        weight = self.weight if self.learned is None else self.learned.multiply(self.weight, self.groups)
        if self.weight_scale is None or self.weight_zero_point is None:
            return weight
        shape = (-1, *(1,) * (weight.dim() - 1))
        return fake_quantize(
            weight, self.weight_scale.view(shape), self.weight_zero_point.view(shape), self.bits.weight, self.low
        )

    def packed_state(self) -> dict[str, Tensor]:
        """Return the tensors of the packed form, named as in the artifact without the layer's name."""
        if self.adapter is not None:
            raise RuntimeError("a layer still learns its weight in another form: merge its adapter first")
        state: dict[str, Tensor] = {}
        weight = self.weight.detach()
        if self.weight_scale is None or self.weight_zero_point is None:
            state["weight"] = weight
        else:
            scale, zero_point = self.weight_scale.detach(), self.weight_zero_point.detach().round()
            rows = weight.flatten(1)
            centred = torch.clamp(
                (rows * scale[:, None].reciprocal()).round(),
                min=self.low - zero_point[:, None],
                max=2**self.bits.weight - 1 - zero_point[:, None],
            )
            state["weight_packed"] = pack((centred + zero_point[:, None]).to(torch.int32), self.bits.weight)
            state["weight_scale"] = scale
            if self.bits.weight != SYMMETRIC_BITS:
                state["weight_zero_point"] = zero_point.to(torch.uint8)
            state["weight_shape"] = torch.tensor(weight.shape, dtype=torch.int32)
        if self.input_scale is not None and self.input_zero_point is not None:
            state["input_scale"] = self.input_scale.detach()
            state["input_zero_point"] = self.input_zero_point.detach().round().to(torch.uint8)
        if self.dilation is not None:
            state["dilation"] = self.dilation
        if self.bias is not None:
            state["bias"] = self.bias.detach()
        if self.low_rank is not None:
            state |= {f"{BRANCH}.{key}": value for key, value in self.low_rank.state_dict().items()}
        return state


def multiply_shared(x: Tensor, *layers: nn.Module) -> list[Tensor]:
    """Return the outputs of several layers on one input; `x` is quantized once where the layers share a quantizer.

    Layers with hooks, such as those of accelerate that bring their tensors, are called one by one.
    """
    first = layers[0]
    if isinstance(first, QuantLayer) and all(
        isinstance(other, QuantLayer) and other.input_scale is first.input_scale and not _is_hooked(other)
        for other in layers
    ):
        quantized = first.quantize_input(x.float())
        return [
            layer.add_branch(layer.multiply(quantized), x).to(x.dtype)
            for layer in layers
            if isinstance(layer, QuantLayer)
        ]
    return [layer(x) for layer in layers]


def _is_hooked(layer: nn.Module) -> bool:
    """Return whether a call of `layer` does more than its class's forward. accelerate replaces `forward` itself."""
    return bool(layer._forward_pre_hooks or layer._forward_hooks or "forward" in layer.__dict__)

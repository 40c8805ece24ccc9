"""Unsigned 8-bit codes of a layer's input, made from floats alone or together with the norm and activation before the layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from dqtool.core.rotation import factor, rotate
from dqtool.nn.adaptable import Adaptable
from dqtool.nn.integer import IntegerLayer
from dqtool.runtimes.cpu import library, ops
from dqtool.runtimes.cpu.library import pointer
from dqtool.runtimes.cpu.op_arguments import Geometry, laid_out
from dqtool.runtimes.cpu.torch_codes import torch_codes

__all__ = ["GEGLU", "GELU", "GELU_TANH", "NONE", "SILU", "Codes", "CurrentStep", "InputCodes"]

LAYOUTS = 64
"""Shapes of inputs for which a layer remembers how its codes lie."""

TABLE = 1 << 16
"""Multipliers of all steps and channels that a layer keeps ready, at most."""

NONE, SILU, GELU_TANH, GELU, GEGLU = range(5)
"""Activations that are fused with the quantizer after them, numbered as in `kernels.cpp`. GEGLU is `value * gelu(gate)` of
the two halves (value, gate) of the channels."""

ACTIVATIONS = {
    NONE: lambda x: x,
    SILU: F.silu,
    GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    GELU: F.gelu,
}


class CurrentStep:
    """Row of the step tables that is in use, shared by all layers of a network.

    Kernels take the number `row`; a traced graph takes `rows`, `[1]` or one for each sample.
    """

    def __init__(self) -> None:
        self.row = 0
        self.rows = torch.zeros(1, dtype=torch.long)


class Codes(NamedTuple):
    """Unsigned codes `[N, H, W, C]` with the padding the layer asked for, and the result's leading shape.

    Linear layers: `data` is `[rows, C]`, `shape` the input's without its channels. Convolutions: `shape` is
    `(N, H_out, W_out)`. `branch` is the layer's low-rank branch of the same input, in the shape of the product, or None.
    """

    data: Tensor
    shape: tuple[int, ...]
    branch: Tensor | None = None


class InputCodes(Adaptable, nn.Module):
    """Geometry of one layer and the quantizer of its input; its methods turn floats into the codes that kernels multiply.

    Some fuse the norm or the activation before the layer. `Product` adds the multiplication.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    packed: Tensor | None
    sums: Tensor | None
    lowest: Tensor | None
    steps: Tensor
    """See `step_table`."""

    def __init__(self, layer: IntegerLayer, current_step: CurrentStep) -> None:
        super().__init__()
        assert layer.input is not None
        self.operand, self.current_step = layer.input, current_step
        self.is_conv = layer.is_conv
        self.out_channels, self.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        if not self.is_conv:  # the names that `nn.Linear` has for them: pipelines read these
            self.in_features, self.out_features = self.in_channels, self.out_channels
        self.kernel = tuple(layer.weight.shape[2:]) if layer.is_conv else (1, 1)
        self.stride, self.padding, self.taps_dilation = layer.stride, layer.padding, layer.taps_dilation
        self.groups = layer.groups
        self.register_buffer(
            "weight", layer.weight.contiguous() if layer.source is None else torch.empty(0, dtype=torch.int8)
        )
        self.register_buffer("weight_scale", layer.weight_scale)
        self.register_buffer("bias", layer.bias)
        self.rotation = layer.rotation
        self.low_rank = None if layer.low_rank is None else layer.low_rank.widened()
        self.scales = self.operand.scale.tolist()
        self.lows, self.highs = self.operand.low.tolist(), self.operand.high.tolist()
        self.offsets = self.operand.offset.tolist()
        self.kernels = library.get()
        self._quantizers: dict[int, tuple] = {}
        self._layouts: dict[tuple, tuple] = {}
        channels = 1 if self.operand.divisor is None else len(self.operand.divisor)
        # Steps follow each other: one table instead of one computation a step, where it is small.
        small = len(self.scales) * channels <= TABLE
        self._multipliers = self.operand.multipliers().contiguous() if small else None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out addresses of memory, which a copy finds anew."""
        return {**self.__dict__, "_quantizers": {}, "_held": None, "kernels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Find the kernels again."""
        super().__setstate__(state)
        self.kernels = library.get()

    # Properties that a subclass sets: the zero point of signed codes, bytes per pixel, and padding inside the codes.
    signed_offset = 128
    channel_bytes: int

    def glue(self, x: Tensor) -> Tensor:
        """Return `x` in the dtype that the kernels read, float32."""
        return x.float()

    def geometry_of_float(self) -> dict[str, object]:
        """See `Adaptable.geometry_of_float`."""
        if not self.is_conv:
            return {"in_features": self.in_channels, "out_features": self.out_channels}
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.taps_dilation,
            "groups": self.groups,
        }

    def padding_of(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the padding (top, bottom, left, right) that the codes of a convolution carry, for one input size."""
        raise NotImplementedError

    @property
    def is_bare(self) -> bool:
        """Return whether the codes are all that the layer needs of its input."""
        return self.low_rank is None and not self.rotation

    @property
    def row(self) -> int:
        """Return the row of the layer's step tables that is in use."""
        return self.current_step.row if len(self.scales) > 1 else 0

    def zero_point(self) -> int:
        """Return the code of a real zero at the current step."""
        return self.signed_offset if self.operand.signed else self.offsets[self.row]

    def zero_points(self) -> list[int]:
        """Return the code of a real zero at each step."""
        return [self.signed_offset] * len(self.scales) if self.operand.signed else self.offsets

    def step_table(self) -> Tensor:
        """Return smallest and largest centred code, zero point and scale at each step, float32 `[T, 4]`, as `ops` takes them."""
        columns = (self.lows, self.highs, self.zero_points(), self.scales)
        return torch.tensor(columns, dtype=torch.float32).T.contiguous()

    def geometry(self, **fields: int) -> list[int]:
        """Return a `Geometry` as a list, with these fields of its second half."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.taps_dilation
        sizes = (self.out_channels, self.in_channels, self.channel_bytes, int(self.is_conv))
        return list(Geometry(*sizes, kh, kw, sh, sw, dh, dw, **fields))

    def traced_quantizer(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return the arguments that the operations of `ops` take in place of `quantizer`."""
        return self.steps, self._multipliers, self.operand.divisor, self.current_step.rows

    def quantizer(self) -> tuple[int, int, float, float, int]:
        """Return the current step's quantizer as the kernels take it: address of the multiplier, whether it is per channel,
        bounds of the centred codes, zero point."""
        row = self.row
        known = self._quantizers.get(row)
        if known is None:
            if self._multipliers is None:
                self._quantizers.clear()  # one step's multipliers at a time
            m = self.operand.multiplier(row).contiguous() if self._multipliers is None else self._multipliers[row]
            values = (m.data_ptr(), int(m.dim()), float(self.lows[row]), float(self.highs[row]), self.zero_point())
            known = self._quantizers[row] = (values, m)
        return known[0]

    @property
    def fuses_quantizer(self) -> bool:
        """Return whether one kernel computes activation, upsampling and codes of the layer's input."""
        return self.kernels is not None and self.is_bare

    def quantize(self, x: Tensor, act: int = NONE, up: int = 1, extra: tuple[int, int] = (0, 0)) -> Codes:
        """Return the codes of `act(x)`; `x` is `[N, C, H, W]` or `[..., C]`.

        An image is first upsampled `up` times (nearest), and gets `extra` zero rows below and zero columns to the right.
        """
        if not self.fuses_quantizer:
            x = ACTIVATIONS[act](x)
            x = x.repeat_interleave(up, -1).repeat_interleave(up, -2) if up > 1 else x
            return self._from_float(x, extra)
        return self._quantize(x, act, up, extra)

    def _from_float(self, x: Tensor, extra: tuple[int, int] = (0, 0)) -> Codes:
        """Return codes and branch of the layer's own input, which `extra` zeros pad."""
        branch = None
        if self.low_rank is not None:
            branch = self.low_rank(F.pad(x, (0, extra[1], 0, extra[0])) if any(extra) else x)
        x = self._rotate(x) if self.rotation else x
        codes = self._torch_codes(x, extra) if self.kernels is None else self._quantize(x, extra=extra)
        return codes._replace(branch=branch)

    def _rotate(self, x: Tensor) -> Tensor:
        """Return the input with its channels rotated."""
        if self.kernels is None or is_compiling():
            return rotate(x, self.rotation, 1 if self.is_conv else -1)
        kernels: Any = self.kernels
        x = laid_out(x, self.is_conv)
        out = torch.empty_like(x)
        count = x.numel() // self.rotation
        kernels.dq_rotate(x.data_ptr(), out.data_ptr(), count, self.rotation, factor(self.rotation))
        return out

    def _quantize(self, x: Tensor, act: int = NONE, up: int = 1, extra: tuple[int, int] = (0, 0)) -> Codes:
        kernels: Any = self.kernels
        if is_compiling():
            wanted, shape, sizes = self._layout(x.shape, self.is_conv, up, extra)
            return Codes(ops.quantize(x, *self.traced_quantizer(), wanted, sizes, self.is_conv, up, act), shape)
        source, data, shape, sizes = self._prepare(x, self.is_conv, up, extra)
        kernels.dq_quantize(source.data_ptr(), data.data_ptr(), *sizes, up, act, *self.quantizer())
        return Codes(data, shape)

    def group_norm(
        self, x: Tensor, norm: nn.GroupNorm, act: int = NONE, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Codes:
        """Return the codes of `act(norm(x) * (1 + scale) + shift)`. `x` is `[N, C, H, W]`; `scale`, `shift` are `[N, C]`.

        A linear layer reads the pixels as positions.
        """
        if not self.fuses_quantizer:
            y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
            if scale is not None and shift is not None:
                y = y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
            y = ACTIVATIONS[act](y)
            return self._from_float(y if self.is_conv else y.flatten(2).transpose(1, 2))
        return self._group_norm(x, norm, act, scale, shift)

    def _group_norm(self, x: Tensor, norm: nn.GroupNorm, act: int, scale: Tensor | None, shift: Tensor | None) -> Codes:
        """Compute `group_norm` by one kernel."""
        kernels: Any = self.kernels
        if is_compiling():
            wanted, shape, sizes = self._layout(x.shape, True, 1, (0, 0))
            of_norm = (norm.weight, norm.bias, norm.num_groups, norm.eps, scale, shift)
            return Codes(ops.group_norm(x, *of_norm, act, *self.traced_quantizer(), wanted, sizes), shape)
        source, data, shape, sizes = self._prepare(x, True)
        scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
        kernels.dq_group_norm_quantize(
            source.data_ptr(),
            data.data_ptr(),
            *sizes,
            norm.num_groups,
            norm.eps,
            pointer(norm._parameters["weight"]),
            pointer(norm._parameters["bias"]),
            pointer(scale),
            pointer(shift),
            act,
            *self.quantizer(),
        )
        return Codes(data, shape)

    def layer_norm(
        self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Codes:
        """Return the codes of `norm(x) * (1 + scale) + shift` for a linear layer; `x` is `[N, S, C]`, `scale`, `shift` `[N, C]`."""
        if not self.fuses_quantizer:
            y = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
            if scale is not None and shift is not None:
                y = y * (1 + scale[:, None]) + shift[:, None]
            return self._from_float(y)
        return self._layer_norm(x, norm, scale, shift)

    def _layer_norm(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None, shift: Tensor | None) -> Codes:
        """Compute `layer_norm` by one kernel."""
        kernels: Any = self.kernels
        n, s, c = x.shape
        if is_compiling():
            of_norm = (norm.weight, norm.bias, norm.eps, scale, shift)
            return Codes(ops.layer_norm(x, *of_norm, *self.traced_quantizer(), self.channel_bytes), (n, s))
        x = x.contiguous()
        scale, shift = (None if t is None else t.expand(n, -1).contiguous() for t in (scale, shift))
        data = torch.empty(n * s, self.channel_bytes, dtype=torch.uint8)
        kernels.dq_layer_norm_quantize(
            x.data_ptr(),
            data.data_ptr(),
            n,
            s,
            c,
            self.channel_bytes,
            norm.eps,
            pointer(norm._parameters["weight"]),
            pointer(norm._parameters["bias"]),
            pointer(scale),
            pointer(shift),
            *self.quantizer(),
        )
        return Codes(data, (n, s))

    def geglu(self, x: Tensor, into: Tensor) -> None:
        """Write codes `[rows, channel_bytes]` of `value * gelu(gate)` for a linear layer; `x` is `[rows, 2 C]` =
        (value, gate)."""
        kernels = self.kernels
        if kernels is None:
            value, gate = x.chunk(2, dim=-1)
            into.copy_(self._torch_codes(value * F.gelu(gate)).data)
            return
        kernels.dq_geglu_quantize(
            x.data_ptr(), into.data_ptr(), len(x), self.in_channels, self.channel_bytes, *self.quantizer()
        )

    def _out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the output of an input that is not padded yet."""
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(
                (height, width), self.padding, self.taps_dilation, self.kernel, self.stride, strict=True
            )
        ]
        return size[0], size[1]

    def _prepare(
        self, x: Tensor, image: bool, up: int = 1, extra: tuple[int, int] = (0, 0)
    ) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
        """Return the input in the kernels' layout, empty codes, the result's shape, and the kernels' size arguments."""
        key = (x.shape, image, up, extra)
        layout = self._layouts.get(key)
        if layout is None:
            if len(self._layouts) >= LAYOUTS:
                self._layouts.clear()
            layout = self._layouts[key] = self._layout(x.shape, image, up, extra)
        wanted, shape, sizes = layout
        x = laid_out(x, image)
        return x, torch.empty(wanted, dtype=torch.uint8), shape, sizes

    def _layout(
        self, given: torch.Size, image: bool, up: int, extra: tuple[int, int]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the shape of the codes of an input of shape `given`, the result's shape, and the kernels' size arguments."""
        if not image:
            c = given[-1]
            rows = given.numel() // c
            return (rows, self.channel_bytes), tuple(given[:-1]), (1, rows, 1, c, self.channel_bytes, 0, 0, 0, 0)
        n, c, h, w = given
        if not self.is_conv:
            return (n * h * w, self.channel_bytes), (n, h * w), (n, h, w, c, self.channel_bytes, 0, 0, 0, 0)
        full = (h * up + extra[0], w * up + extra[1])
        top, bottom, left, right = self.padding_of(*full)
        bottom, right = bottom + extra[0], right + extra[1]
        codes = (n, h * up + top + bottom, w * up + left + right, self.channel_bytes)
        return codes, (n, *self._out_size(*full)), (n, h, w, c, self.channel_bytes, top, bottom, left, right)

    def _torch_codes(self, x: Tensor, extra: tuple[int, int] = (0, 0)) -> Codes:
        return Codes(*torch_codes(self, x, extra))

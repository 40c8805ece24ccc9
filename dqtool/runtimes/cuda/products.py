"""Quantized layers on a GPU: codes in channels-last bytes, int8 products, results in the network's dtype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from dqtool.nn.integer import IntegerLayer
from dqtool.runtimes.cpu.codes import NONE, Codes, CurrentStep
from dqtool.runtimes.cpu.product import PLAIN, Epilogue, Product
from dqtool.runtimes.cuda import ops
from dqtool.runtimes.cuda.geometry import Geometry, Padding
from dqtool.runtimes.cuda.planes import arrange, chunk_of, pack_planes, padded_channels

__all__ = ["CudaProduct", "Glue", "KeepsDtype", "fits"]

LARGEST_SUM = 2**31 - 1
"""Largest accumulator that int32 holds."""


class Glue(CurrentStep):
    """The rows in use, on the device of the sample, and the dtype in which the network computes between products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float32
        self._moved: tuple[Tensor, dict[torch.device, Tensor]] = (self.rows, {})

    def rows_on(self, device: torch.device) -> Tensor:
        """Return the rows in use on the device of a layer. A network that is spread over devices moves them once to each."""
        rows = self.rows
        if rows.device == device or is_compiling():
            return rows.to(device)
        if self._moved[0] is not rows:
            self._moved = (rows, {})
        found = self._moved[1].get(device)
        if found is None:
            found = self._moved[1][device] = rows.to(device)
        return found


class KeepsDtype(nn.Module):
    """A module whose tensors move between devices and keep their dtypes: step tables, scales, multipliers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep(t: Tensor) -> Tensor:
            changed = fn(t)
            return changed if changed.dtype == t.dtype else t.to(changed.device)

        return super()._apply(keep, recurse)  # type: ignore[no-untyped-call]


def fits(layer: IntegerLayer) -> bool:
    """Return whether the kernels compute a layer exactly: sums of stored codes stay within int32."""
    if not layer.is_integer or layer.input is None:
        return False
    count = layer.weight.shape[1:].numel()
    return 255 * 128 * count <= LARGEST_SUM


class CudaProduct(KeepsDtype, Product):
    """One layer on the GPU's kernels, whose weight stays in bit planes.

    Signed codes are stored as they are. Other codes (8 bits, asymmetric) are stored minus 128, so that they fit int8.
    """

    planes: Tensor
    zeros: Tensor
    divisor: Tensor | None

    def __init__(self, layer: IntegerLayer, glue: Glue) -> None:
        nn.Module.__init__(self)
        assert layer.input is not None
        assert layer.weight_scale is not None
        self.operand, self.current_step = layer.input, glue
        self.is_conv, self.groups = layer.is_conv, layer.groups
        self.out_channels, self.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
        if not self.is_conv:
            self.in_features, self.out_features = self.in_channels, self.out_channels
        self.kernel = tuple(layer.weight.shape[2:]) if layer.is_conv else (1, 1)
        self.stride, self.padding, self.taps_dilation = layer.stride, layer.padding, layer.taps_dilation
        self.rotation = layer.rotation
        self.low_rank = None if layer.low_rank is None else layer.low_rank.widened()
        self.kernels = None
        width = layer.weight.shape[1]
        self.channel_bytes = padded_channels(width)
        codes, zeros, bits = _stored(layer)
        rows = arrange(codes, zeros, self.groups)
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.taps_dilation
        sizes = (self.out_channels, self.in_channels, self.groups, self.channel_bytes, int(self.is_conv))
        self.sizes = Geometry(*sizes, kh, kw, sh, sw, dh, dw, bits, int(self.operand.signed))
        sums = rows.to(torch.int32).sum(1, dtype=torch.int32) - rows.shape[1] * zeros.to(torch.int32)
        self.register_buffer(
            "planes", pack_planes(rows ^ 128 if bits == 8 else rows, bits, chunk_of(self.channel_bytes))
        )
        self.register_buffer("zeros", zeros)
        self.register_buffer("sums", sums.to(torch.int32))
        self.register_buffer("weight_scale", layer.weight_scale.to(torch.float32))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(torch.float32))
        self.register_buffer("divisor", self.operand.divisor)
        self.register_buffer("steps", self.step_table())

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to copy: nothing here refers to memory by address."""
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        nn.Module.__setstate__(self, state)

    def step_table(self) -> Tensor:
        """Return smallest and largest centred code, offset of the stored code, and scale at each step, float32 `[T, 4]`."""
        o = self.operand
        offset = o.offset - (0 if o.signed else 128)
        return torch.stack([t.to(torch.float32) for t in (o.low, o.high, offset, o.scale)], 1).contiguous()

    def glue(self, x: Tensor) -> Tensor:
        """Return `x` itself: kernels read every floating dtype."""
        return x

    def padding_of(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the convolution's own padding."""
        p, q = self.padding
        return p, p, q, q

    @property
    def fuses_quantizer(self) -> bool:
        """See `InputCodes.fuses_quantizer`."""
        return self.is_bare

    def _from_float(self, x: Tensor, extra: tuple[int, int] = (0, 0)) -> Codes:
        """See `Product._from_float`."""
        branch = None
        if self.low_rank is not None:
            branch = self.low_rank(F.pad(x, (0, extra[1], 0, extra[0])) if any(extra) else x)
        x = self._rotate(x.float()) if self.rotation else x
        return self._quantize(x, extra=extra)._replace(branch=branch)

    def _quantize(self, x: Tensor, act: int = NONE, up: int = 1, extra: tuple[int, int] = (0, 0)) -> Codes:
        if self.is_conv:
            padding, shape = self._image(x.shape, up, extra)
            return Codes(ops.quantize(x, *self._quantizer(), padding, act), shape)
        image, shape = _as_image(x), tuple(x.shape[:-1])
        data = ops.quantize(image, *self._quantizer(), self._flat(image.shape[3]), act)
        return Codes(data.view(-1, self.channel_bytes), shape)

    def _group_norm(self, x: Tensor, norm: nn.GroupNorm, act: int, scale: Tensor | None, shift: Tensor | None) -> Codes:
        """See `InputCodes._group_norm`."""
        of_norm = (norm.weight, norm.bias, norm.num_groups, norm.eps, scale, shift, act)
        if self.is_conv:
            padding, shape = self._image(x.shape, 1, (0, 0))
            return Codes(ops.group_norm(x, *of_norm, *self._quantizer(), padding), shape)
        n, _, h, w = x.shape
        data = ops.group_norm(x, *of_norm, *self._quantizer(), self._flat(w, h))
        return Codes(data.view(-1, self.channel_bytes), (n, h * w))

    def _layer_norm(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None, shift: Tensor | None) -> Codes:
        """See `InputCodes._layer_norm`."""
        of_norm = (norm.weight, norm.bias, norm.eps, scale, shift)
        return Codes(ops.layer_norm(x, *of_norm, *self._quantizer(), self.channel_bytes), tuple(x.shape[:2]))

    def _feed(self, codes: Codes, following: Product, act: int) -> Codes:
        """See `Product.feed`. GEGLU and GELU are part of the product."""
        assert isinstance(following, CudaProduct)
        data = ops.linear_codes(
            codes.data, *self._weight(), self.bias, self.steps, self._rows(), list(codes.shape), list(self.sizes),
            following.steps, following.divisor, following.channel_bytes, act,
        )  # fmt: skip
        return Codes(data, codes.shape)

    def _multiply(self, codes: Codes, then: Epilogue = PLAIN) -> Tensor:
        """See `Product.multiply`."""
        bias, residual, post, gate = then
        if residual is not None and self.is_conv:
            residual = residual.permute(0, 2, 3, 1)
        dtype = self.current_step.dtype if isinstance(self.current_step, Glue) else torch.float32
        out = ops.product(
            codes.data, *self._weight(), self.bias if bias is None else bias, gate, residual, self.steps, self._rows(),
            list(codes.shape), list(self.sizes), post, dtype,
        )  # fmt: skip
        return out.permute(0, 3, 1, 2) if self.is_conv else out

    def accumulators(self, codes: Codes) -> Tensor:
        """Return the sums before scales and bias, int32, shaped as the product."""
        from dqtool.runtimes.cuda.launch import multiply_codes

        out = codes.data.new_empty((*codes.shape, self.out_channels), dtype=torch.int32)
        weight, rows = self._weight(), self._rows()
        multiply_codes(codes.data, weight, None, None, None, self.steps, rows, codes.shape, self.sizes, out, raw=True)
        return out.permute(0, 3, 1, 2) if self.is_conv else out

    def forward(self, input: Tensor, *_: object) -> Tensor:
        """Compute the output of the replaced layer, in the dtype of `input`."""
        return self.multiply(self.quantize(input)).to(input.dtype)

    @property
    def qweight(self) -> Tensor:
        """See `Adaptable.qweight`."""
        return self.weight_scale

    def _weight(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.sums is not None
        return self.planes, self.zeros, self.sums, self.weight_scale

    def _rows(self) -> Tensor:
        return (
            self.current_step.rows_on(self.steps.device)
            if isinstance(self.current_step, Glue)
            else self.current_step.rows
        )

    def _quantizer(self) -> tuple[Tensor, Tensor | None, Tensor]:
        return self.steps, self.divisor, self._rows()

    def _flat(self, width: int, height: int = 1) -> list[int]:
        """Return how the codes of a linear layer lie."""
        return list(Padding(self.in_channels, self.channel_bytes, 1, height, width, 0, 0, 1))

    def _image(self, given: torch.Size, up: int, extra: tuple[int, int]) -> tuple[list[int], tuple[int, ...]]:
        """Return how the codes of an image `[N, C, H, W]` lie, and the result's shape without channels."""
        n, _, h, w = given
        full = (h * up + extra[0], w * up + extra[1])
        top, bottom, left, right = self.padding_of(*full)
        size = (top + full[0] + bottom, left + full[1] + right)
        channels = self.in_channels // self.groups
        padding = Padding(channels, self.channel_bytes, self.groups, *size, top, left, up)
        return list(padding), (n, *self._out_size(*full))


def _stored(layer: IntegerLayer) -> tuple[Tensor, Tensor, int]:
    """Return codes uint8 in the weight's shape, zero points uint8 `[C_out]`, and the bits of a code."""
    from dqtool.core.packing import unpack

    source = layer.source
    if source is None:  # centred codes alone: as bytes
        zeros = torch.full((layer.weight.shape[0],), 128, dtype=torch.uint8, device=layer.weight.device)
        return (layer.weight.view(torch.uint8) ^ 128), zeros, 8
    bits = source.bits
    codes = unpack(source.words, bits, source.shape[1:].numel()).view(source.shape)
    if bits == 1:  # no plane is that thin alone
        bits = 2
    return codes, source.zero_points.to(torch.uint8), bits


def _as_image(x: Tensor) -> Tensor:
    """Return rows `[N, ..., C]` as an image `[N, C, 1, positions]`."""
    rows = x.unsqueeze(0) if x.dim() == 1 else x
    rows = rows.reshape(rows.shape[0], rows.shape[1:-1].numel(), rows.shape[-1])
    return rows.transpose(1, 2).unsqueeze(2)

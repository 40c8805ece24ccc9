"""Products on the compiled kernels (AMX, AVX512-VNNI or AVX2), with the accumulators of `nn.integer.accumulate`, exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dqtool.core.allocator import FilePages
from dqtool.nn.integer import IntegerLayer
from dqtool.nn.packed_form import keep_out_of_states
from dqtool.runtimes.cpu import library, ops
from dqtool.runtimes.cpu.codes import GEGLU, Codes, CurrentStep
from dqtool.runtimes.cpu.layout import expanded, pack_weight, worth_winograd
from dqtool.runtimes.cpu.library import pointer
from dqtool.runtimes.cpu.op_arguments import INT8, KERNEL_LAYOUT, WINOGRAD_LAYOUT
from dqtool.runtimes.cpu.product import PLAIN, Epilogue, Product

__all__ = ["NativeProduct"]

WINOGRAD_BITS = 5
"""Most bits of input codes whose Winograd transform fits a byte with VNNI: 4 * (2^5 - 1) = 124. AVX2 has forms for all."""


class NativeProduct(Product):
    """On the compiled kernels. Weights go from packed codes to the kernels' layout at their first use: until then loading
    has read nothing of them, and the size of the problem decides where a Winograd transform is possible (3x3 convolutions
    on AVX2, or of narrow codes: 16 bytes for 9 where they are narrow, and 2.25x fewer products).

    A layer that feeds GEGLU has its values' and its gates' columns in turn, so that the codes of the next layer's input come
    out at once.

    Without VNNI, codes are stored unsigned from 0 up to 2^b - 1: the smaller they are, the more sums fit 16 bits."""

    stored: list[int] | None = None
    gates: int = 0
    """Columns that gate as many others, which come before them, where weights are packed for `feed` with GEGLU."""
    compact = False
    """Two codes share a byte of memory, where weights have up to 4 bits."""
    pages: FilePages | None = None
    """Pages of the file that maps the packed codes. They are released after the codes have been read."""

    def __init__(self, layer: IntegerLayer, current_step: CurrentStep) -> None:
        super().__init__(layer, current_step)
        self.channel_bytes = -(-self.in_channels // 4) * 4
        geometry = (self.kernel, self.stride, self.taps_dilation)
        self.may_winograd = (
            library.has_products()
            and not library.on_tiles(self.channel_bytes)  # these need no fewer products, and a smaller weight
            and self.is_conv
            and geometry == ((3, 3), (1, 1), (1, 1))
            and (not library.has_vnni() or (self.operand.signed and self.operand.bits <= WINOGRAD_BITS))
            and self.in_channels >= 16
            and self.out_channels >= 16
        )
        self.winograd: bool | None = None if self.may_winograd else False
        self._held: tuple | None = None
        self.source = layer.source
        self.narrow = layer.source is not None and layer.source.bits <= 4 and not library.has_vnni()
        self.register_buffer("packed", None)
        self.register_buffer("sums", None)
        self.register_buffer("lowest", None)
        if not library.has_vnni() and self.operand.signed:
            self.stored = self.operand.zero_point.tolist()
        self.machine = library.layout_of_machine(self.channel_bytes)
        self.largest_code = 2**self.operand.bits - 1 if not library.has_vnni() else 255
        self.largest_weight = 128
        self.pages = None
        self.steps = self.step_table()

    def zero_point(self) -> int:
        """See `Product.zero_point`."""
        if self.stored is None:
            return super().zero_point()
        return self.stored[self.row]

    def zero_points(self) -> list[int]:
        """See `Product.zero_points`."""
        return super().zero_points() if self.stored is None else self.stored

    def padding_of(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the convolution's own padding, and for Winograd one more where the output's size is odd."""
        (p, q), odd = self.padding, (0, 0)
        if self.may_winograd:
            out = self._out_size(height, width)
            odd = (out[0] % 2, out[1] % 2)
        return p, p + odd[0], q, q + odd[1]

    def _multiply(self, codes: Codes, then: Epilogue = PLAIN) -> Tensor:
        """See `Product.multiply`."""
        bias, residual, post, gate = then
        if is_compiling():
            weight, how = self._traced_weight(self.gates)
            rest = (self.steps, self.current_step.rows, codes.shape, how, post)
            return ops.multiply(codes.data, *weight, bias, gate, residual, *rest)
        kernels: Any = self.kernels
        _, packed, sums, lows, scales, own = self._held or self._hold(codes)
        co = self.out_channels
        per_sample, pixels = 0, 0
        if bias is not None:
            bias = bias.contiguous()
            own, per_sample = bias.data_ptr(), co
        scale = self.scales[self.row]
        data = codes.data
        if not self.is_conv:
            rows = data.shape[0]
            out = torch.empty(*codes.shape, co)
            if residual is not None:
                residual = residual.contiguous()
            extra = None if residual is None else residual.data_ptr()
            geometry: tuple[int, ...] = (1, 1, rows, self.channel_bytes, 1, rows, co, 1, 1, 1, 1, 1, 1)
            pixels = rows // codes.shape[0] if bias is not None or gate is not None else 0
        else:
            n, hp, wp, cp = data.shape
            _, ho, wo = codes.shape
            out = torch.empty((n, co, ho, wo), memory_format=torch.channels_last)
            if residual is not None:
                residual = residual.contiguous(memory_format=torch.channels_last)
            extra = None if residual is None else residual.data_ptr()
            if self.winograd:
                assert gate is None, "gates are for linear layers"
                kernels.dq_winograd(
                    data.data_ptr(), packed, sums, lows, self.zero_point(), self.largest_code, n, hp, wp, cp, ho, wo, co,
                    scales, scale, own, per_sample, extra, post, out.data_ptr(),
                )  # fmt: skip
                return out
            geometry = (n, hp, wp, cp, ho, wo, co, *self.kernel, *self.stride, *self.taps_dilation)
        gated: tuple = (None, 0)
        if gate is not None:
            gate = gate.expand(codes.shape[0], -1)
            gated = (gate.data_ptr(), gate.stride(0))
        kernels.dq_conv(
            data.data_ptr(), packed, sums, lows, self.zero_point(), self.largest_code, self.largest_weight, *geometry,
            scales, scale, own, per_sample, pixels, *gated, extra, post, self.gates, out.data_ptr(),
        )  # fmt: skip
        return out

    def _feed(self, codes: Codes, following: Product, act: int) -> Codes:
        """See `Product.feed`; nothing is written between but the codes."""
        if is_compiling():
            return self._traced_feed(codes, following, act)
        kernels: Any = self.kernels
        half = self.out_channels // 2
        if act == GEGLU and self.packed is None and half % 64 == 0:
            self.gates = half
        if bool(self.gates) != (act == GEGLU) or following.kernels is None or self.out_channels % 4:
            return super()._feed(codes, following, act)
        _, packed, sums, lows, scales, own = self._held or self._hold(codes)
        scale = self.scales[self.row]
        rows = codes.data.shape[0]
        data = torch.empty(rows, following.channel_bytes, dtype=torch.uint8)
        kernels.dq_linear_codes(
            codes.data.data_ptr(), packed, sums, lows, self.zero_point(), self.largest_code, self.largest_weight, rows,
            self.channel_bytes, self.out_channels, scales, scale, own, self.gates, data.data_ptr(),
            following.channel_bytes, act,
            *following.quantizer(),
        )  # fmt: skip
        return Codes(data, codes.shape)

    def _traced_feed(self, codes: Codes, following: Product, act: int) -> Codes:
        half = self.out_channels // 2
        fresh = self.packed is None
        gates = half if fresh and act == GEGLU and half % 64 == 0 else self.gates
        if bool(gates) != (act == GEGLU) or following.kernels is None or self.out_channels % 4:
            return super()._feed(codes, following, act)
        weight, geometry = self._traced_weight(gates)
        next_ = (*following.traced_quantizer(), following.channel_bytes)
        return Codes(ops.linear_codes(codes.data, *weight, self.steps, geometry, *next_, act), codes.shape)

    def _traced_weight(self, gates: int) -> tuple[tuple[Tensor, Tensor | None, Tensor, Tensor | None], list[int]]:
        """Return the weight, its sums or zero points, its scales and bias, and the `Geometry` that names their form."""
        source, machine = self.source, 0
        weight, beside, form = self.weight, None, INT8
        if self.packed is not None:
            weight, beside, form = self.packed, self.sums, WINOGRAD_LAYOUT if self.winograd else KERNEL_LAYOUT
            machine = self.machine
            if self.lowest is not None and self.sums is not None:
                (weight, beside), form = expanded(self.packed, self.sums, self.lowest), KERNEL_LAYOUT
        elif source is not None:
            weight, beside, form = source.words, source.zero_points, source.bits
        geometry = self.geometry(
            gates=gates,
            largest_code=self.largest_code,
            may_winograd=int(self.may_winograd),
            form=form,
            largest_weight=self.largest_weight,
            machine=machine,
        )
        return (weight, beside, self.weight_scale, self.bias), geometry

    def _hold(self, codes: Codes) -> tuple:
        """Return the layer's tensors, so that they stay, and their addresses."""
        if self.packed is None:
            self._pack(codes)
        held = (self.packed, self.sums, self.lowest, self.weight_scale, self.bias)
        self._held = (held, *(pointer(t) for t in held))
        return self._held

    def __getstate__(self) -> dict[str, Any]:
        """See `Product`. A copy's codes are not the file's."""
        return {**super().__getstate__(), "pages": None}

    def _pack(self, codes: Codes) -> None:
        source = self.source
        # A network may have been moved to channels-last as a whole.
        weight = self.weight.contiguous() if source is None else source.words
        wanted = self.winograd is None and worth_winograd(self.out_channels, self.in_channels, codes.shape)
        held = pack_weight(
            weight,
            None if source is None else source.zero_points,
            8 if source is None else source.bits,
            (self.out_channels, self.in_channels, self.kernel[0] * self.kernel[1], self.channel_bytes),
            self.gates,
            self.largest_code * wanted,
            self.compact,
        )
        if source is not None and self.pages is not None:
            self.pages.release(source.words.data_ptr(), source.words.nbytes)
        self.packed, self.sums, self.winograd, self.largest_weight, self.lowest = held
        keep_out_of_states(self)
        self.weight, self.source, self.pages = torch.empty(0, dtype=torch.int8), None, None

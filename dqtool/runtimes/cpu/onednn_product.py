"""Products on PyTorch's oneDNN operations: grouped convolutions, and all layers where there is no compiler.

They give the accumulators of `nn.integer.accumulate`, exactly, for the layers that `OnednnProduct.exact` admits.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.compiler import is_compiling

from dqtool.nn.integer import IntegerLayer, Operand
from dqtool.nn.packed_form import keep_out_of_states
from dqtool.runtimes.cpu import ops
from dqtool.runtimes.cpu.codes import Codes, CurrentStep
from dqtool.runtimes.cpu.product import PLAIN, Epilogue, Product, per_sample
from dqtool.runtimes.cpu.threads import float_threads

__all__ = ["OnednnProduct", "saturates"]


class OnednnProduct(Product):
    """On PyTorch's oneDNN operations. Signed codes get the zero point 2^b: small codes can't saturate the 16-bit sums of
    CPUs without VNNI."""

    def __init__(self, layer: IntegerLayer, current_step: CurrentStep) -> None:
        super().__init__(layer.unpacked(), current_step)
        self.signed_offset = min(128, 2**self.operand.bits)
        self.channel_bytes = self.in_channels
        self.register_buffer("packed", None)
        self.register_buffer("zeros", torch.zeros(self.out_channels, dtype=torch.int32))
        self.steps = self.step_table()

    @staticmethod
    def exact(layer: IntegerLayer) -> bool:
        """Return whether accumulators are exact on this machine: pairs of products must fit 16 bits where sums saturate."""
        assert layer.input is not None
        largest = 2 ** (layer.input.bits + 1) if layer.input.signed else 255
        return not saturates() or 2 * largest * int(layer.unpacked().weight.abs().max()) <= 32767

    def padding_of(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Return the convolution's own padding: codes carry it, because the zero point may change with the step."""
        p, q = self.padding
        return p, p, q, q

    def _multiply(self, codes: Codes, then: Epilogue = PLAIN) -> Tensor:
        """See `Product.multiply`."""
        if is_compiling():
            return self._traced(codes, then)
        positions = codes.data.numel() // self.in_channels
        with float_threads(positions * self.out_channels * self.in_channels // self.groups * prod(self.kernel)):
            return self._finish(self._product(codes, then), then)

    def _product(self, codes: Codes, then: Epilogue) -> Tensor:
        """Return the product with the layer's own bias, unless the epilogue replaces it."""
        onednn = torch.ops.onednn
        scale = self.scales[self.row]
        zero_point = self.zero_point()
        own = self.bias if then.bias is None else None
        if self.is_conv:
            stride, dilation, padding = list(self.stride), list(self.taps_dilation), [0, 0]
            if self.packed is None:
                self.packed = onednn.qconv_prepack(
                    self.weight, self.weight_scale, 1.0, zero_point, stride, padding, dilation, self.groups, None
                )
            out = onednn.qconv2d_pointwise(
                codes.data.permute(0, 3, 1, 2), scale, zero_point, self.packed, self.weight_scale, self.zeros, own,
                stride, padding, dilation, self.groups, 1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
        else:
            if self.packed is None:
                self.packed = onednn.qlinear_prepack(self.weight, None)
            out = onednn.qlinear_pointwise(
                codes.data, scale, zero_point, self.packed, self.weight_scale, self.zeros, own,
                1.0, 0, torch.float32, "none", [], "",
            )  # fmt: skip
            out = out.reshape(*codes.shape, self.out_channels)
        if self.weight.numel():
            self.weight = torch.empty(0, dtype=torch.int8)
            keep_out_of_states(self)
        return out

    def _traced(self, codes: Codes, then: Epilogue) -> Tensor:
        own, packed = self.bias if then.bias is None else None, self.packed
        weight = (self.weight, False) if packed is None else (packed, True)
        rest = (self.steps, self.current_step.rows, codes.shape, self.geometry(), self.groups)
        out = ops.onednn_multiply(codes.data, *weight, self.weight_scale, self.zeros, own, *rest)
        return self._finish(out, then)

    def _finish(self, out: Tensor, then: Epilogue) -> Tensor:
        """Return `out` after the epilogue, computed in place."""
        if then.bias is not None:
            out += then.bias[:, :, None, None] if self.is_conv else per_sample(then.bias, out)
        if then.gate is not None:
            out *= per_sample(then.gate, out)
        if then.residual is not None:
            out += then.residual
        return out if then.post == 1.0 else out.mul_(then.post)


@functools.cache
def saturates() -> bool:
    """Return whether oneDNN's sums of wide codes saturate here, as they do on CPUs without VNNI. A trial decides."""
    layer = IntegerLayer(
        Operand(8, torch.ones(1), torch.zeros(1, dtype=torch.int32)),
        torch.full((32, 64, 3, 3), 127, dtype=torch.int8),
        torch.ones(32),
        None,
        None,
        True,
    )
    conv = OnednnProduct(layer, CurrentStep())
    codes = Codes(torch.full((1, 8, 8, 64), 255, dtype=torch.uint8), (1, 6, 6))
    linear = OnednnProduct(replace(layer, weight=layer.weight[:, :, 0, 0], is_conv=False), CurrentStep())
    rows = Codes(torch.full((32, 64), 255, dtype=torch.uint8), (32,))
    exact = 255 * 127 * 64
    return bool((conv.multiply(codes) != exact * 9).any() or (linear.multiply(rows) != exact).any())

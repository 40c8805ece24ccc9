"""One quantized layer on integers: codes of its input, an int8 product, a float32 result.

`NativeProduct` and `OnednnProduct` implement the multiplication.
"""

from __future__ import annotations

import copy
from typing import NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from dqtool.runtimes.cpu import ops
from dqtool.runtimes.cpu.codes import GEGLU, Codes, InputCodes

__all__ = ["PLAIN", "Epilogue", "Product", "per_sample", "plain"]

PIECE = 8 << 20
"""Bytes of floats between two linear layers that are made at a time."""


class Epilogue(NamedTuple):
    """Operations after a product, in this order: `((product + bias) * gate + residual) * post`.

    `bias` `[N, C_out]` replaces the layer's own. `gate` is `[N, C_out]`, for a linear layer on `[N, S, C]`. `residual` has the
    result's shape.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    post: float = 1.0
    gate: Tensor | None = None


PLAIN = Epilogue()


def plain(layer: object) -> TypeGuard[Product]:
    """Return whether a module is a product with nothing around it: no adapter, and no hook of accelerate, which fetches the tensors
    of a module when it is called."""
    return isinstance(layer, Product) and not hooked(layer)


def hooked(module: object) -> bool:
    """Return whether a hook of accelerate or of diffusers fetches a module's tensors when it is called."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return `values` `[N, C]` in a shape that broadcasts against `like` `[N, ..., C]`."""
    return values.view(len(values), *(1,) * (like.dim() - 2), -1)


class Product(InputCodes):
    """One layer. Call it like the layer that it replaces, or make codes and multiply in two steps."""

    def multiply(
        self,
        codes: Codes,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        post: float = 1.0,
        gate: Tensor | None = None,
    ) -> Tensor:
        """Return `((product + branch + bias) * gate + residual) * post`, float32, channels-last; see `Epilogue`."""
        branch = codes.branch
        if branch is not None:
            branch = branch if gate is None else branch * per_sample(gate, branch)
            residual = branch if residual is None else residual + branch
        return self._multiply(codes, Epilogue(bias, residual, post, gate))

    def _multiply(self, codes: Codes, then: Epilogue = PLAIN) -> Tensor:
        """Return the product after its epilogue, without the branch."""
        raise NotImplementedError

    def feed(self, codes: Codes, following: Product, act: int) -> Codes:
        """Return the codes of `act(product)` for the linear layer `following`; this layer is linear, too."""
        if self.is_bare and following.is_bare:
            return self._feed(codes, following, act)
        between = self.multiply(codes)
        if act == GEGLU:
            value, gate = between.chunk(2, dim=-1)
            return following.quantize(value * F.gelu(gate))
        return following.quantize(between, act)

    def _feed(self, codes: Codes, following: Product, act: int) -> Codes:
        """Return what `feed` does for two layers that are bare.

        The layers run on pieces of the rows: the floats between them (84 MB in Stable Diffusion's largest block) then stay in
        the processor's cache, and no fresh memory is touched.
        """
        if is_compiling():
            between = self._multiply(Codes(codes.data, (codes.data.shape[0],)))
            if act != GEGLU:
                return Codes(following.quantize(between, act).data, codes.shape)
            if following.kernels is None:
                value, gate = between.chunk(2, dim=-1)
                return Codes(following._torch_codes(value * F.gelu(gate)).data, codes.shape)
            data = ops.geglu(between, *following.traced_quantizer(), following.channel_bytes)
            return Codes(data, codes.shape)
        rows = codes.data.shape[0]
        piece = max(48, PIECE // (4 * self.out_channels) // 48 * 48)
        data = torch.empty(rows, following.channel_bytes, dtype=torch.uint8)
        for start in range(0, rows, piece):
            part = codes.data[start : start + piece]
            between = self._multiply(Codes(part, (len(part),)))
            if act == GEGLU:
                following.geglu(between, data[start : start + piece])
            else:
                data[start : start + piece] = following.quantize(between, act).data
        return Codes(data, codes.shape)

    def accumulators(self, codes: Codes) -> Tensor:
        """Return the sums before scales and bias, as float32 (exact below 2^24). For checks only: it copies the layer."""
        bare = copy.deepcopy(self)
        bare.scales = [1.0] * len(bare.scales)
        bare.weight_scale, bare.bias = torch.ones_like(bare.weight_scale), None
        return bare._multiply(codes)

    def forward(self, input: Tensor, *_: object) -> Tensor:
        """Compute the output of the replaced layer in float32, and return it in the dtype of `input`."""
        return self.multiply(self.quantize(self.glue(input))).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel}, input_bits={self.operand.bits}"

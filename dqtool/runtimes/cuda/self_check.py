"""Check of the kernels on the device at hand, before a network runs on them: their sums of products must be exact.

A GPU, a driver or a version of Triton that nobody tried may compile a kernel wrongly. The check takes three small layers, once a
process; it finds what is wrong on every layer, and leaves the rest to `make gpu-check`.
"""

from __future__ import annotations

from functools import cache

import torch

from dqtool.core.packing import pack
from dqtool.nn.integer import IntegerLayer, Operand, PackedCodes, accumulate
from dqtool.runtimes.cuda.products import CudaProduct, Glue

__all__ = ["fault_of"]

CASES = ((4, 0), (8, 0), (4, 3))
"""Bits and kernel size of each layer; size 0 is a linear layer."""

IN_CHANNELS, OUT_CHANNELS = 96, 48


@cache
def fault_of(device: str) -> str | None:
    """Return what is wrong with the kernels on a device, as the end of a sentence; None if their sums are exact."""
    for bits, kernel in CASES:
        layer, x, codes = _case(bits, kernel)
        glue = Glue()
        glue.rows = torch.zeros(1, dtype=torch.long, device=device)
        try:
            product = CudaProduct(layer, glue).to(device)
            found = product.accumulators(product.quantize(x.to(device))).cpu()
        except Exception as error:
            said = " ".join(str(error).split())[:120]
            return f"its kernels don't run on this device ({type(error).__name__}: {said})"
        if not torch.equal(found.to(torch.int64), accumulate(codes, layer.unpacked())):
            return f"its kernels compute wrong sums on this device (at {bits} bits); please report this"
    return None


def _case(bits: int, kernel: int) -> tuple[IntegerLayer, torch.Tensor, torch.Tensor]:
    """Return a layer of random codes, an input that lies on the quantizer's grid, and the centred codes of the input, int32."""
    random = torch.Generator().manual_seed(bits + kernel)
    shape = (OUT_CHANNELS, IN_CHANNELS, kernel, kernel) if kernel else (OUT_CHANNELS, IN_CHANNELS)
    low, high, zero = int(bits == 8), 2**bits - 1, 2 ** (bits - 1)
    weight = torch.randint(low, high + 1, shape, generator=random, dtype=torch.int32)
    zeros = torch.full((OUT_CHANNELS,), zero, dtype=torch.uint8)
    source = PackedCodes(pack(weight.flatten(1), bits), zeros, bits, torch.Size(shape))
    operand = Operand(bits, torch.full((1,), 0.5), torch.full((1,), zero, dtype=torch.int32))
    ghost = torch.empty(shape, dtype=torch.int8, device="meta")
    scale = torch.ones(OUT_CHANNELS)
    padding = (1, 1) if kernel else (0, 0)
    layer = IntegerLayer(operand, ghost, scale, None, None, kernel > 0, padding=padding, source=source)
    size = (2, IN_CHANNELS, 6, 6) if kernel else (2, 8, IN_CHANNELS)
    codes = torch.randint(-zero, high + 1 - zero, size, generator=random, dtype=torch.int32)
    return layer, codes * 0.5, codes

"""Check of the kernels on the device at hand, before a network runs on them: their sums of products must be exact, and attention
the simulation's.

A GPU, a driver or a version of Triton that nobody tried may compile a kernel wrongly. The check takes three small layers and one
attention, once a process; it finds what is wrong on every layer, and leaves the rest to `make gpu-check`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn

from dqtool.core.bits import AttentionBits
from dqtool.core.packing import pack
from dqtool.nn.attention import OPERANDS, QuantAttnProcessor
from dqtool.nn.integer import IntegerLayer, Operand, PackedCodes, accumulate, integer_attention
from dqtool.nn.steps import StepIndex
from dqtool.runtimes.cuda.attention import AttentionTables
from dqtool.runtimes.cuda.products import CudaProduct, Glue

__all__ = ["attention_differences", "fault_of"]

CASES = ((4, 0), (8, 0), (4, 3))
"""Bits and kernel size of each layer; size 0 is a linear layer."""

IN_CHANNELS, OUT_CHANNELS = 96, 48

HEADS, STEPS = 2, 3
"""Heads and rows of the step tables of each attention."""

MEAN_DIFFERENCE, ROW_DIFFERENCE = 1e-3, 0.1
"""Largest differences of attention from the simulation, as `attention_differences` counts them: a probability on a rounding tie may
take the neighbouring code."""


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
            return _failed(error)
        if not torch.equal(found.to(torch.int64), accumulate(codes, layer.unpacked())):
            return f"its kernels compute wrong sums on this device (at {bits} bits); please report this"
    try:
        mean, row = attention_differences(device, 4, 8, 40, 70, 40, masked=True)
    except Exception as error:
        return _failed(error)
    if not (mean <= MEAN_DIFFERENCE and row <= ROW_DIFFERENCE):  # so that NaN is wrong
        return "its kernels compute wrong attention on this device; please report this"
    return None


def attention_differences(
    device: str, bits: int, probs: int, queries: int, keys: int, dim: int, masked: bool
) -> tuple[float, float]:
    """Return how far random attention of two samples at two steps is from the simulation's on the CPU: the mean of all differences,
    and that of the worst row of a head, both relative to the mean size of a value.

    `bits` are those of q, k and v, `probs` those of the softmax. With `masked` half of the second sample's keys are out.
    """
    from dqtool.runtimes.cuda.launch import attend

    attn, random = _attention(bits, probs, keys), torch.Generator().manual_seed(dim + bits)
    steps, picked = attn.processor.steps, torch.tensor([2, 0])
    steps.select(picked)
    shapes = [(2, count, HEADS, dim) for count in (queries, keys, keys)]
    q, k, v = (torch.randn(shape, generator=random).transpose(1, 2) for shape in shapes)
    mask = None
    if masked:
        mask = torch.zeros(2, 1, 1, keys)
        mask[1, :, :, keys // 2 :] = -10000.0
    expected = attn.processor.attend(attn, q, k, v, mask, dim**-0.5)
    tables = AttentionTables(integer_attention(attn)).to(device)
    operands = (q.to(device), k.to(device), v.to(device))
    on_device = None if mask is None else mask.to(device)
    scales = (tables.tables, tables.scores, tables.results)
    found = attend(operands, on_device, *scales, picked.to(device), dim**-0.5, tables.largest)
    off, size = (found.cpu() - expected).abs(), float(expected.abs().mean())
    return float(off.mean()) / size, float(off.unflatten(2, (HEADS, dim)).mean(3).max()) / size


def _attention(bits: int, probs: int, keys: int) -> Any:
    """Return an attention module with random tables, which suit operands of unit variance."""
    random = torch.Generator().manual_seed(bits)
    attn: Any = nn.Module()
    attn.processor = QuantAttnProcessor(AttentionBits(bits, probs), StepIndex(torch.arange(STEPS) * 10.0))
    for name in OPERANDS:
        own, spread = (probs, 12 / keys) if name == "probs" else (bits, 6.0)
        attn.register_buffer(f"{name}_scale", (torch.rand(STEPS, HEADS, generator=random) + 0.5) * spread / 2**own)
        if name != "probs" and bits != 8:
            zeros = torch.randint(2 ** (bits - 1) - 1, 2 ** (bits - 1) + 2, (STEPS, HEADS), generator=random)
            attn.register_buffer(f"{name}_zero_point", zeros.to(torch.uint8))
    return attn


def _failed(error: Exception) -> str:
    said = " ".join(str(error).split())[:120]
    return f"its kernels don't run on this device ({type(error).__name__}: {said})"


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

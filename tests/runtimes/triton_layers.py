"""Layers for tests of the `cuda` runtime, whose kernels run in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels of the cuda runtime are written in Triton")

from dqtool.core.packing import pack
from dqtool.nn.integer import IntegerLayer, Operand, PackedCodes
from dqtool.runtimes.cuda.products import CudaProduct, Glue

__all__ = ["at_rows", "packed_layer_of", "stepped"]

STEPS = 3


def packed_layer_of(
    co: int,
    ci: int,
    bits: int,
    input_bits: int = 0,
    kernel: int = 0,
    groups: int = 1,
    divided: bool = False,
    **geometry: object,
) -> IntegerLayer:
    """Return a layer of random packed codes with `STEPS` steps; `kernel` 0 makes it linear."""
    input_bits = input_bits or bits
    shape = (co, ci // groups, kernel, kernel) if kernel else (co, ci)
    q = 2**bits - 1
    zeros = torch.randint(0, q + 1, (co,), dtype=torch.uint8) if bits < 8 else torch.full((co,), 128, dtype=torch.uint8)
    codes = torch.randint(0 if bits < 8 else 1, q + 1, shape, dtype=torch.int32)
    source = PackedCodes(pack(codes.flatten(1), bits), zeros, bits, torch.Size(shape))
    operand = Operand(
        input_bits,
        torch.rand(STEPS) * 0.1 + 0.05,
        torch.randint(0, 2**input_bits, (STEPS,), dtype=torch.int32),
        divisor=torch.rand(ci) + 0.5 if divided else None,
    )
    return IntegerLayer(
        operand, torch.empty(shape, dtype=torch.int8, device="meta"), torch.rand(co) * 0.1, torch.randn(co),
        operand.divisor, kernel > 0, groups=groups, source=source, **geometry,  # type: ignore[arg-type]
    )  # fmt: skip


def stepped(layer: IntegerLayer, *rows: int) -> CudaProduct:
    """Return the product of a layer at these rows of its tables."""
    glue = Glue()
    glue.rows = torch.tensor(rows)
    return CudaProduct(layer, glue)


def at_rows(layer: IntegerLayer, x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return the centred codes of each sample of `x` at its row, int32."""
    dim = 1 if layer.is_conv else -1
    assert layer.input is not None
    return torch.stack([layer.input.codes(x[i : i + 1], row, dim)[0] for i, row in enumerate(rows)])

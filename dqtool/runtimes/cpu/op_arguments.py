"""Arguments and results of the operations in `ops.py`: runs of samples at one step, addresses, weights, empty results."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dqtool.errors import EnvironmentFault
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.layout import PackedWeight, pack_weight, worth_winograd
from dqtool.runtimes.cpu.library import pointer

__all__ = [
    "INT8",
    "KERNEL_LAYOUT",
    "PACKED",
    "WINOGRAD_LAYOUT",
    "Geometry",
    "address",
    "empty_codes",
    "empty_product",
    "kernels",
    "laid_out",
    "packed_weight",
    "quantized_runs",
    "runs_of_rows",
    "step_values",
]

KERNEL_LAYOUT, WINOGRAD_LAYOUT, INT8 = 0, -1, -2
"""Forms of a weight: as the kernels read it, the same transformed by Winograd, and plain int8 codes. A positive form is a
number of bits: packed words with their zero points."""


class Geometry(NamedTuple):
    """Integer arguments of a product's operation, passed as one list."""

    out_channels: int
    in_channels: int
    channel_bytes: int
    is_conv: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    dilation_h: int
    dilation_w: int
    gates: int = 0
    largest_code: int = 255
    may_winograd: int = 0
    form: int = INT8
    """`KERNEL_LAYOUT`, `WINOGRAD_LAYOUT`, `INT8`, or the bits of packed words."""
    largest_weight: int = 128
    machine: int = 0
    """`library.layout_of_machine` where the weight is in a layout of the kernels."""


PACKED: Any = WeakTensorKeyDictionary()
"""Weights that came as codes, in the kernels' layout, for as long as the codes live."""


def empty_codes(like: Tensor, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Return empty codes of this shape."""
    return like.new_empty(shape, dtype=torch.uint8)


def empty_product(codes: Tensor, g: Geometry, shape: list[int]) -> Tensor:
    """Return an empty result of a product."""
    if not g.is_conv:
        return codes.new_empty((*shape, g.out_channels), dtype=torch.float32)
    n, h, w = shape
    return torch.empty(
        (n, g.out_channels, h, w), dtype=torch.float32, device=codes.device, memory_format=torch.channels_last
    )


def kernels() -> Any:
    """Return the compiled kernels.

    Raises:
        EnvironmentFault: they are missing, as they may be for a program that was exported elsewhere.
    """
    kernels = library.get()
    if kernels is None:
        raise EnvironmentFault(
            f"This graph needs dqtool's kernels, and they are missing: {library.problem()}", where="torch.ops.dqtool"
        )
    return kernels


def runs_of_rows(rows: Tensor, units: int) -> Iterator[tuple[int, int, int]]:
    """Yield runs (start, stop, row) of neighbours with the same row among `units` samples.

    Each of `rows` serves equally many samples. A layer whose input has no batch takes the first row.
    """
    values = rows.tolist()
    values = values[:1] if units % len(values) else values
    each, start = units // len(values), 0
    for row, group in groupby(values):
        stop = start + each * len(list(group))
        yield start, stop, row
        start = stop


def step_values(steps: Tensor, row: int) -> list[float]:
    """Return smallest code, largest code, zero point and scale of a step. A static quantizer has one row."""
    found: list[float] = steps[row if len(steps) > 1 else 0].tolist()
    return found


def quantized_runs(
    rows: Tensor, units: int, steps: Tensor, multipliers: Tensor | None, divisor: Tensor | None
) -> Iterator[tuple[int, int, int, tuple[int, int, float, float, int]]]:
    """Yield (start, stop, row, the kernels' five arguments for a quantizer) for each of `runs_of_rows`.

    The arguments hold the address of a tensor that lives until the next run is asked for.
    """
    for start, stop, row in runs_of_rows(rows, units):
        multiplier, arguments = _quantizer(steps, multipliers, divisor, row)
        yield start, stop, row, arguments
        del multiplier


def _quantizer(
    steps: Tensor, multipliers: Tensor | None, divisor: Tensor | None, row: int
) -> tuple[Tensor, tuple[int, int, float, float, int]]:
    """Return the multiplier, and the kernels' five arguments, of which the first is its address."""
    low, high, zero_point, scale = step_values(steps, row)
    if multipliers is not None:
        m = multipliers[row if len(multipliers) > 1 else 0]
    else:
        m = torch.tensor(scale) if divisor is None else torch.tensor(scale) * divisor
        m = m.reciprocal()
    return m, (m.data_ptr(), m.dim(), low, high, int(zero_point))


def address(t: Tensor | None, start: int, units: int) -> int | None:
    """Return the address of the unit `start` of the `units` that a dense tensor holds."""
    if t is None or not units:
        return pointer(t)
    return t.data_ptr() + start * (t.numel() // units) * t.element_size()


def laid_out(x: Tensor, image: bool) -> Tensor:
    """Return the tensor in the layout that the kernels read: channels-last for an image."""
    return x.contiguous(memory_format=torch.channels_last if image else torch.contiguous_format)


def packed_weight(weight: Tensor, sums: Tensor | None, g: Geometry, shape: list[int] | tuple[int, ...]) -> PackedWeight:
    """Return the weight in the kernels' layout, packed at its first use where it came as codes.

    Raises:
        EnvironmentFault: it came in the layout of another kind of processor.
    """
    if g.form in (KERNEL_LAYOUT, WINOGRAD_LAYOUT):
        if g.machine != library.layout_of_machine(g.channel_bytes):
            raise EnvironmentFault(
                "This graph was exported after its network had run, and holds weights in the layout of another kind of "
                "processor",
                where="torch.ops.dqtool.multiply",
                fix="Export the network before its first call",
            )
        assert sums is not None
        return PackedWeight(weight, sums, g.form == WINOGRAD_LAYOUT, g.largest_weight)
    known = PACKED.get(weight)
    if known is None or known[0] != g.gates:
        wanted = g.may_winograd and worth_winograd(g.out_channels, g.in_channels, tuple(shape))
        sizes = (g.out_channels, g.in_channels, g.kernel_h * g.kernel_w, g.channel_bytes)
        bits = 8 if g.form == INT8 else g.form
        known = (
            g.gates,
            pack_weight(weight, None if g.form == INT8 else sums, bits, sizes, g.gates, g.largest_code * wanted),
        )
        PACKED[weight] = known
    held: PackedWeight = known[1]
    return held

"""Cost of a quantized model: bit operations and bytes on disk (App. B of arXiv 2409.14307), as plain integers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

from dqtool.artifacts.header import file_header
from dqtool.artifacts.records import LayerRecord
from dqtool.core.bits import FLOAT_BITS, bits_from_json

__all__ = ["bops", "bops_ratio", "file_bytes", "float_bops", "samples_together", "size_ratio", "together_for"]

FLOAT32 = (32, 32)

BRANCH_COST = 16 * 32
"""Bit operations of a multiply-accumulate in a low-rank branch: 16-bit weights, float32 inputs."""


WORK_TOGETHER, GPU_WORK_TOGETHER = 64 * 10**9, 4 * 10**12
"""Multiply-accumulates of the samples that run together on a CPU and elsewhere: large networks gain nothing from more and need
memory for it. On a GPU, a dozen samples of Stable Diffusion keep it busy."""
BLOCKS = 8
"""Blocks that share a network's work, roughly: so many more samples run together through one block at a time."""


def samples_together(layers: Iterable[LayerRecord], most: int, device: str = "cpu") -> int:
    """Return how many samples run together on a kind of device: `most` where the network is small, few where it is large."""
    return together_for(sum(layer.macs for layer in layers), most, device)


def together_for(work: int, most: int, device: str) -> int:
    """Return `samples_together` of a network of `work` multiply-accumulates."""
    work = work or 1
    return max(1, min(most, (WORK_TOGETHER if device == "cpu" else GPU_WORK_TOGETHER) // work))


def replayed_together(work: int, most: int, device: str) -> int:
    """Return how many samples run together through one block at a time of a network of `work` multiply-accumulates."""
    return together_for(work // BLOCKS, most, device)


def bops(layers: Iterable[LayerRecord]) -> int:
    """Return the bit operations of layers with the bits that manifests record; layers without bits run in float32.

    Widths of 16 or more mean float32 operands, which count as 32 bits. A layer of kind "attention" stands for two
    products with half of its MACs each. MACs are those of one forward pass at the batch size for which they were counted.
    A `low_rank` branch multiplies 16-bit weights with 32-bit inputs.
    """
    total = 0
    for layer in layers:
        widths = layer.bits or FLOAT32
        total += bits_from_json(layer.kind, widths).operations(layer.macs)
        if layer.low_rank and widths[0] < FLOAT_BITS:
            total += BRANCH_COST * _branch_macs(layer)
    return total


def _branch_macs(layer: LayerRecord) -> int:
    """Return the multiply-accumulates of a layer's low-rank branch: `r (C_in · taps + C_out)` at each output position."""
    rows, columns = layer.shape[0], prod(layer.shape[1:])
    return layer.macs // (rows * columns) * layer.low_rank * (rows + columns)


def float_bops(layers: Iterable[LayerRecord]) -> int:
    """Return the bit operations of the same layers in float32."""
    return sum(bits_from_json(layer.kind, FLOAT32).operations(layer.macs) for layer in layers)


def bops_ratio(layers: Sequence[LayerRecord]) -> float:
    """Return the bit operations in float32 divided by those of these layers; 1 for a model without layers."""
    quantized = bops(layers)
    return sum(layer.macs for layer in layers) * 32**2 / quantized if quantized else 1.0


def file_bytes(tensors: Mapping[str, tuple[str, Sequence[int]]], metadata: Mapping[str, str] | None = None) -> int:
    """Return the exact size in bytes of the safetensors file that holds `{name: (dtype, shape)}`.

    The file consists of 8 bytes of length, a JSON header padded to a multiple of 8, and the data. A dtype is its name
    in safetensors (`F32`) or in torch (`float32`, `torch.float32`). `metadata` defaults to `{"format": "pt"}`; an empty
    mapping omits the entry.

    Raises:
        ValueError: a dtype is unknown.
    """
    header, _, data = file_header(tensors, metadata)
    return len(header) + data


def size_ratio(before: int, after: int) -> float:
    """Return `before / after`: the factor by which a file shrank."""
    return before / after if after else float("inf")

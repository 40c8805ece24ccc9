"""A model of a product's time on a GPU, by occupancy and bytes: it chooses blocks and says how far a kernel is from the limit.

Rates are those of data sheets, dense. The numbers of instructions and registers are those of the compiled kernels (sm_90).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from dqtool.runtimes.cuda.planes import PLANES, chunk_of

__all__ = ["GPUS", "Estimate", "Gpu", "best_tile", "candidates", "estimate", "gpu_of", "shared_bytes"]


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU: processors, their clock in GHz, int8 multiply-adds of one per cycle, memory and L2 cache in TB/s,
    shared memory of a processor in KiB, whether warp groups multiply from shared memory (compute capability 9.0), float32
    multiply-adds of a processor per cycle, and memory in GB."""

    name: str
    processors: int
    clock: float
    multiplies: int
    memory: float
    cache: float
    shared: int = 100
    warp_groups: bool = False
    floats: int = 128
    size: int = 24

    @property
    def float_peak(self) -> float:
        """Return float32 multiply-adds per second, all processors together, without TensorFloat-32."""
        return self.processors * self.clock * 1e9 * self.floats

    @property
    def peak(self) -> float:
        """Return int8 multiply-adds per second, all processors together."""
        return self.processors * self.clock * 1e9 * self.multiplies


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 132, 1.755, 4096, 4.8, 7.0, 227, True, size=141),
        Gpu("H100", 132, 1.755, 4096, 3.35, 5.5, 227, True, size=80),
        Gpu("A100", 108, 1.41, 2048, 1.94, 4.0, 163, floats=64, size=80),
        Gpu("L40S", 142, 2.52, 1024, 0.86, 4.0, 99, size=48),
        Gpu("RTX 4090", 128, 2.52, 1024, 1.01, 5.0, 99),
        Gpu("A10", 72, 1.70, 1024, 0.60, 2.0, 99),
    )
}
"""Known GPUs by a part of their names."""

OTHER = GPUS["A100"]
"""Rates assumed for an unknown GPU."""

REGISTERS = 65536
LATENCY = 1200
"""Cycles until the first chunk of a block has arrived, and after the last multiplication."""

UNPACK = {2: 1.3, 3: 2.2, 4: 1.2, 5: 2.0, 6: 2.0, 7: 2.8, 8: 0.0}
"""Instructions that unpack one code, counted in compiled inner loops at 4 bits; at others from the instructions for four codes."""

SPLITS = (1, 2, 3, 4, 6, 8)
"""Numbers of blocks that may share the codes of a result."""

SPLIT_COST = 4e-6
"""Seconds for clearing the sums of shared results and for the kernel that finishes them, beside their traffic."""

LOOP = 80
"""Other instructions of a warp in each chunk."""

EPILOGUE = 7
"""Instructions for each element that a thread stores."""


@dataclass(frozen=True)
class Estimate:
    """Predicted seconds of one product; its lower limit by arithmetic and by bytes; what bounds it; warps that a processor
    holds at once."""

    seconds: float
    limit: float
    bound: str
    warps: int

    @property
    def reached(self) -> float:
        """Return the share of the limit that the design reaches."""
        return self.limit / self.seconds


def gpu_of(name: str) -> Gpu:
    """Return the rates of the GPU whose name contains that of a known one."""
    return next((gpu for known, gpu in GPUS.items() if known in name), OTHER)


def candidates(bits: int, gated: bool, warp_groups: bool = True) -> list[tuple[int, int, int, int]]:
    """Return the blocks to choose from: rows, columns, warps, stages. All of them compile without spills, those with `warp_groups`
    for sm_90 and those without for sm_80."""
    small = [(16, 64, 4, 4), (32, 64, 4, 4), (64, 64, 4 if warp_groups or not gated else 8, 4), (128, 64, 8, 4)]
    if gated:
        return small
    large = [(64, 128, 4, 4), (128, 128, 8, 3)]
    return [*small, *large, (256, 128, 8, 3)] if bits in (4, 8) and warp_groups else [*small, *large]


def shared_bytes(gpu: Gpu, tile: tuple[int, int, int, int], bits: int, gated: bool, chunk: int) -> int:
    """Return the shared memory of a block, as Triton's compiler lays it out: loads in flight, and unpacked weights."""
    rows, columns, _, stages = tile
    across = columns * (2 if gated else 1)
    if bits == 8:
        return (stages if gpu.warp_groups else stages - 1) * chunk * (rows + across)
    planes = chunk // 2 * across * len(PLANES[bits])
    return (stages - 1) * (chunk * rows + planes) + chunk * across * (3 if gpu.warp_groups else 1) // 2


def estimate(
    gpu: Gpu,
    m: int,
    n: int,
    k: int,
    bits: int,
    gated: bool,
    tile: tuple[int, int, int, int],
    out_bytes: int = 2,
    taps: int = 1,
    splits: int = 1,
) -> Estimate:
    """Return the predicted time of a product of `m` rows and `n` columns over `k` codes (`taps` of a convolution read each
    pixel again), whose results `splits` blocks share."""
    rows, columns, warps, _ = tile
    chunk, twice = chunk_of(k // taps), 2 if gated else 1
    across = columns * twice
    shared = shared_bytes(gpu, tile, bits, gated, chunk)
    registers = min(255, 56 + rows * across // (warps * 32) + (24 if bits not in (4, 8) else 0)) * warps * 32
    held = max(1, min(gpu.shared * 1024 // shared, REGISTERS // registers, 64 // warps, 32))
    # Arithmetic units are busy less than always: warps wait for each other, and narrow blocks for their operands.
    busy = 0.8 if gpu.warp_groups and rows >= 64 else 0.5 if gpu.warp_groups else 0.7
    busy *= min(1.0, 0.5 + min(rows, across) / 256)
    multiply = rows * across * chunk / (gpu.multiplies * busy)
    issue = (across * chunk * UNPACK[bits] / 32 + LOOP * warps) / 4
    planes = 1 if bits == 8 else len(PLANES[bits]) / 2  # bytes of a code that a block loads
    load = chunk * (rows + across * planes) / (gpu.cache * 1e3 / gpu.processors / gpu.clock)
    finish = rows * across * EPILOGUE / 32 / 4
    chunks = math.ceil(k / chunk / splits)
    parts = {"arithmetic": multiply, "instructions": issue, "cache": load}
    work = chunks * max(parts.values()) + finish
    blocks = math.ceil(m / rows) * math.ceil(n / columns) * splits
    waves = blocks / (gpu.processors * held)
    full, rest = divmod(blocks, gpu.processors * held)
    last = math.ceil(rest / gpu.processors)
    cycles = full * (held * work + LATENCY / held) + (last * work + LATENCY if rest else 0)
    traffic = m * k / taps + n * twice * k * bits / 8 + m * n * out_bytes
    by_memory = traffic / (gpu.memory * 1e12)
    by_arithmetic = m * n * twice * k / gpu.peak
    seconds = max(cycles / (gpu.clock * 1e9), by_memory)
    if splits > 1:
        seconds += SPLIT_COST + 4 * m * n * (2 * splits + 1) / (gpu.cache * 1e12)
    bound = max(parts, key=lambda name: parts[name])
    if seconds == by_memory:
        bound = "memory"
    elif waves < 1 or chunks * max(parts.values()) < finish + LATENCY:
        bound = "latency"
    return Estimate(seconds, max(by_memory, by_arithmetic), bound, held * warps)


@functools.lru_cache(maxsize=4096)
def best_tile(gpu: Gpu, m: int, n: int, k: int, bits: int, gated: bool) -> tuple[int, int, int, int, int]:
    """Return the block with the least predicted time among those that fit the shared memory, and by how many its results are
    shared. Sizes that grow by less than a block give the same one."""
    chunk = chunk_of(k)
    fitting = [
        t
        for t in candidates(bits, gated, gpu.warp_groups)
        if shared_bytes(gpu, t, bits, gated, chunk) <= gpu.shared * 1024
    ]
    splits = [s for s in ((1,) if gated else SPLITS) if s == 1 or 4 * s <= k // chunk]
    pairs = [(tile, split) for tile in fitting for split in splits]
    tile, split = min(pairs, key=lambda p: estimate(gpu, m, n, k, bits, gated, p[0], splits=p[1]).seconds)
    return (*tile, split)

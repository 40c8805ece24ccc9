"""Report of `dqtool bench`, as its JSON holds it and the page reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from dqtool.artifacts.schema import Record

__all__ = [
    "BENCH_FORMAT",
    "AloneRow",
    "BenchReport",
    "BenchedModel",
    "KernelRow",
    "LoadRow",
    "MachineRecord",
    "RooflineRow",
    "SpeedRow",
]

BENCH_FORMAT = "dqtool-bench/1"


@dataclass(frozen=True)
class MachineRecord(Record):
    """Processor, instruction sets that matter for integers (None: unknown), threads, and versions of packages."""

    processor: str
    cores: int | None
    threads: int
    flags: list[str] | None
    expect: str
    platform: str
    versions: dict[str, str]


@dataclass(frozen=True)
class BenchedModel(Record):
    """The exported network: its class, number of weights, bits of most layers, and bytes on disk."""

    written: ClassVar[frozenset[str]] = frozenset({"arch", "sha256"})

    class_name: Annotated[str, "class"]
    parameters: int
    bits: str
    file_bytes: int
    origin: Annotated[str, "from"]
    arch: str | None = None
    sha256: str = ""


@dataclass(frozen=True)
class SpeedRow(Record):
    """Seconds of one step of a contender: median, 10th and 90th percentile. `ratio` is to the baseline's median."""

    written: ClassVar[frozenset[str]] = frozenset({"note", "baseline"})

    contender: str
    median: float
    p10: float
    p90: float
    calls: int
    ratio: float | None
    note: str | None = None
    baseline: bool = False


@dataclass(frozen=True)
class LoadRow(Record):
    """Seconds to load a contender and to end its first step, and bytes at the peak (None: the system keeps no count). On a GPU
    the bytes are those of its memory, and `weight_bytes` those of weights and tables."""

    contender: str
    load: float
    ready: float
    peak_bytes: int | None
    private_bytes: int | None
    weight_bytes: int | None = None


@dataclass(frozen=True)
class AloneRow(Record):
    """Seconds of one step in a process of its own: on the clock and of all processors. Memory and bytes on disk (None:
    unknown). `ratio` is to eager float32's seconds on the clock, measured likewise."""

    contender: str
    wall: float
    processor: float
    calls: int
    peak_bytes: int | None
    file_bytes: int | None
    ratio: float | None


@dataclass(frozen=True)
class RooflineRow(Record):
    """One kind of kernel within a step: calls, share of the step, seconds, operations a second, the part of the measured
    peak that the products done reach, bytes moved (None: does not apply), and what bounds it."""

    kind: str
    calls: int
    share: float
    seconds: float
    rate: float | None
    of_peak: float | None
    moved: float | None
    bound: str


@dataclass(frozen=True)
class KernelRow(Record):
    """One shape of product within a step on a GPU: how many of them, rows, columns and codes of each, the block that computes it,
    predicted seconds of all, the share of the device's limit that the design reaches, and what bounds it."""

    count: int
    rows: int
    columns: int
    codes: int
    block: str
    seconds: float
    reached: float
    bound: str


@dataclass(frozen=True)
class BenchReport(Record):
    """All of a benchmark: a table of speed for each batch size, one of loading, and where peers are among the
    contenders one of processes of their own for each batch size. `roofline` describes a step of the `cpu` runtime at `load_batch`,
    `scaling` gives its seconds by number of threads. `gpu` names the device of a benchmark on one, `left_out` says why contenders
    were not measured there, and `kernels` how far the design of its products is from the device's limit."""

    written: ClassVar[frozenset[str]] = frozenset({"format", "load_batch", "weights_in_memory"})

    command: str
    model: BenchedModel
    machine: MachineRecord
    seconds: float
    speed: dict[str, list[SpeedRow]]
    load: list[LoadRow]
    load_batch: int = 1
    weights_in_memory: dict[str, str] = field(default_factory=dict)
    alone: dict[str, list[AloneRow]] = field(default_factory=dict)
    roofline: list[RooflineRow] = field(default_factory=list)
    scaling: dict[str, float] = field(default_factory=dict)
    gpu: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    kernels: list[KernelRow] = field(default_factory=list)
    format: str = BENCH_FORMAT

"""Roofline of the `cpu` runtime: what each kind of kernel reaches in a step, and what bounds it.

A proxy stands before the compiled kernels while the network runs, and notes the time, the operations and the bytes of every
call. *Peak* is what the same products reach with operands in the caches and long sums, *bandwidth* what a copy of memory
reaches, both measured on the same threads. A kind is bound by what takes longer at these rates, and by `the rest` (writing
results, softmax, packing) if neither takes half of its time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dqtool.artifacts.bench_report import RooflineRow

if TYPE_CHECKING:
    from torch import nn

    from dqtool.bench.subject import Arguments, Subject

__all__ = ["Call", "counted", "measure_roofline", "measure_scaling", "peak_rate"]

PRODUCTS = "3x3 convolution", "Winograd convolution", "1x1 convolution and linear", "linear to codes", "attention"
FLOATS = {
    "dq_quantize": "quantizer",
    "dq_group_norm_quantize": "group norm to codes",
    "dq_layer_norm_quantize": "layer norm to codes",
    "dq_geglu_quantize": "GEGLU to codes",
    "dq_rotate": "rotation",
}
REST = "everything else"
HALF = 0.5
COPY = 64 << 20
"""Bytes of the copy that bandwidth is measured with, beyond every cache but the largest."""


@dataclass
class Call:
    """Sums over the calls of one kind: seconds, multiply-adds times two, those really done, bytes moved, number."""

    seconds: float = 0.0
    operations: float = 0.0
    done: float = 0.0
    moved: float = 0.0
    calls: int = 0


@dataclass
class _Proxy:
    """Stands for the library of kernels, and counts what its functions do."""

    kernels: Any
    found: dict[str, Call] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.kernels, name)
        if name not in COUNTED and name not in FLOATS:
            return function

        def timed(*arguments: Any) -> Any:
            kind, operations, done, moved = COUNTED[name](arguments) if name in COUNTED else (FLOATS[name], 0, 0, 0)
            start = time.perf_counter()
            result = function(*arguments)
            call = self.found.setdefault(kind, Call())
            call.seconds += time.perf_counter() - start
            call.operations, call.done, call.moved = call.operations + operations, call.done + done, call.moved + moved
            call.calls += 1
            return result

        return timed


def _of_conv(a: tuple) -> tuple[str, float, float, float]:
    n, hp, wp, cp, ho, wo, co, kh, kw = a[7:16]
    operations = 2.0 * n * ho * wo * co * cp * kh * kw
    moved = n * hp * wp * cp + co * cp * kh * kw + 4 * n * ho * wo * co * (2 if a[27] else 1)
    return (PRODUCTS[0] if kh * kw > 1 else PRODUCTS[2]), operations, operations, moved


def _of_winograd(a: tuple) -> tuple[str, float, float, float]:
    n, hp, wp, cp, ho, wo, co = a[6:13]
    operations = 2.0 * n * ho * wo * co * cp * 9
    tiles = n * -(-ho // 2) * -(-wo // 2)
    return PRODUCTS[1], operations, 2.0 * tiles * 16 * co * cp, n * hp * wp * cp + 16 * co * cp + 4 * n * ho * wo * co


def _of_linear_codes(a: tuple) -> tuple[str, float, float, float]:
    rows, cp, co, following = a[7], a[8], a[9], a[15]
    operations = 2.0 * rows * cp * co
    return PRODUCTS[3], operations, operations, rows * cp + co * cp + rows * following


def _of_attention(a: tuple) -> tuple[str, float, float, float]:
    n, h, sq, sk, d = a[6:11]
    operations = 4.0 * n * h * sq * sk * d
    return PRODUCTS[4], operations, operations, 4.0 * n * h * d * (2 * sq + 2 * sk)


COUNTED: dict[str, Callable[[tuple], tuple[str, float, float, float]]] = {
    "dq_conv": _of_conv,
    "dq_winograd": _of_winograd,
    "dq_linear_codes": _of_linear_codes,
    "dq_attention": _of_attention,
}
"""Kind, operations of the plain product, operations really done, and bytes of a call, from its arguments."""


@contextmanager
def counted() -> Iterator[dict[str, Call]]:
    """Count what the kernels do for networks that are loaded and run meanwhile, by kind."""
    from dqtool.runtimes.cpu import library

    kernels, original = library.get(), library.get
    assert kernels is not None
    proxy = _Proxy(kernels)
    library.get = lambda: proxy  # type: ignore[assignment,return-value]
    try:
        yield proxy.found
    finally:
        library.get = original


def peak_rate(bits: int) -> float:
    """Return operations a second of products of codes of this width, operands in the caches."""
    import torch

    from dqtool.runtimes.cpu import library
    from dqtool.runtimes.cpu.layout import pack_weight

    kernels: Any = library.get()
    threads, depth, columns = torch.get_num_threads(), 2048, 16
    rows, half = 96 * threads, 2 ** (bits - 1)
    weight = torch.randint(-half, half, (columns, depth), dtype=torch.int8)
    held = pack_weight(weight, None, 8, (columns, depth, 1, depth), 0, False)
    codes = torch.randint(0, 2**bits, (rows, depth), dtype=torch.uint8)
    scale, out = torch.ones(columns), torch.empty(rows, columns)
    largest = 255 if library.has_vnni() else 2**bits - 1

    def run() -> None:
        kernels.dq_conv(
            codes.data_ptr(), held.packed.data_ptr(), held.sums.data_ptr(), None, half, largest, held.largest, 1, 1, rows, depth,
            1, rows, columns, 1, 1, 1, 1, 1, 1, scale.data_ptr(), 1.0, None, 0, 0, None, 0, None, 1.0, 0, out.data_ptr(),
        )  # fmt: skip

    return 2.0 * rows * depth * columns / _fastest(run)


def bandwidth() -> float:
    """Return bytes a second of a copy, reading and writing counted."""
    import torch

    source = torch.ones(COPY, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * COPY / _fastest(lambda: target.copy_(source))


def _fastest(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Return the smallest time of a call within so many seconds."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measure_roofline(subject: Subject, batch: int, bits: int, seconds: float) -> list[RooflineRow]:
    """Run steps of the `cpu` runtime and return one row for each kind of kernel, the costliest first."""
    from dqtool.runtimes import load

    inputs = subject.inputs(batch)
    with counted() as found:
        network = load(subject.directory, "cpu")
        _step(network, inputs[0])  # packs weights
        found.clear()
        start, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - start < seconds:
            _step(network, inputs[steps % len(inputs)])
            steps += 1
        total = time.perf_counter() - start
    peak, copy = peak_rate(bits), bandwidth()
    rows = [
        RooflineRow(
            kind, call.calls // steps, call.seconds / total, call.seconds / steps,
            call.operations / call.seconds if call.operations else None,
            call.done / call.seconds / peak if call.done else None,
            call.moved / steps if call.moved else None, _bound(call, peak, copy),
        )
        for kind, call in found.items()
    ]  # fmt: skip
    rest = total - sum(call.seconds for call in found.values())
    rows.append(RooflineRow(REST, 0, rest / total, rest / steps, None, None, None, "PyTorch"))
    done = sum(call.done for call in found.values())
    rows.sort(key=lambda row: -row.seconds)
    return [RooflineRow("whole step", 0, 1.0, total / steps, done / total, done / total / peak, None, ""), *rows]


def _bound(call: Call, peak: float, copy: float) -> str:
    if not call.done:
        return "float arithmetic"
    products, memory = call.done / peak / call.seconds, call.moved / copy / call.seconds
    if max(products, memory) < HALF:
        return "the rest"
    return "products" if products >= memory else "memory"


def measure_scaling(subject: Subject, batch: int, seconds: float) -> dict[str, float]:
    """Return seconds of a step of the `cpu` runtime by number of threads, 1, 2, 4 and so on up to all cores."""
    import os

    import torch

    from dqtool.runtimes import load

    network, inputs, before = load(subject.directory, "cpu"), subject.inputs(batch), torch.get_num_threads()
    cores = os.cpu_count() or 1
    counts = sorted({2**i for i in range(cores.bit_length()) if 2**i < cores} | {cores})
    found = {}
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            _step(network, inputs[0])
            times: list[float] = []
            end = time.perf_counter() + seconds
            while len(times) < 3 or time.perf_counter() < end:
                start = time.perf_counter()
                _step(network, inputs[len(times) % len(inputs)])
                times.append(time.perf_counter() - start)
            found[str(threads)] = statistics.median(times)
    finally:
        torch.set_num_threads(before)
    return found


def _step(network: nn.Module, arguments: Arguments) -> None:
    import torch

    with torch.no_grad():
        network(**arguments, return_dict=False)

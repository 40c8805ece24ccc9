"""Benchmark on one device: every contender alone in its memory, loaded, timed at each batch, and dropped before the next one."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import torch

from dqtool import report
from dqtool.artifacts.bench_report import LoadRow, SpeedRow
from dqtool.bench.gpu_contenders import (
    GPU_CONTENDERS,
    GpuTiming,
    contender_network,
    dtype_of,
    float_network,
    measured,
    missing,
    on_device,
    quantized_network,
    weight_bytes,
)
from dqtool.bench.subject import Subject
from dqtool.errors import EnvironmentFault, UsageError

__all__ = ["device_contenders", "measure_on"]

OURS = "ours"
BASELINE = "fp32"


def device_contenders(asked: Sequence[str], device: torch.device) -> list[str]:
    """Return the contenders to measure on a device: those asked for, or all that can run there. Ours are always among them.

    Raises:
        UsageError: there is no such contender on a device.
        EnvironmentFault: one that was asked for can't run here.
    """
    if not asked:
        return [name for name in GPU_CONTENDERS if missing(name, device) is None]
    for name in asked:
        if name not in GPU_CONTENDERS and name != "none":
            raise UsageError(
                f"unknown contender '{name}' on a GPU",
                where="--against",
                fix=f"Choose from {', '.join(GPU_CONTENDERS)}",
            )
        if name in GPU_CONTENDERS and (reason := missing(name, device)) is not None:
            raise EnvironmentFault(f"The contender {name} can't run here", where="--against", fix=reason)
    ours = [name for name in GPU_CONTENDERS if name.startswith(OURS) and missing(name, device) is None]
    return [name for name in GPU_CONTENDERS if name in {*ours, *asked}]


def measure_on(
    device: torch.device, subject: Subject, names: Sequence[str], batches: Sequence[int], seconds: float
) -> tuple[dict[str, list[SpeedRow]], list[LoadRow], dict[str, str]]:
    """Return the rows of speed by batch, those of loading and memory, and why contenders were left out.

    Peak memory counts the weights and one step at the first batch, as PyTorch's allocator does. A contender that runs out of
    memory, or fails, is left out, and the others go on.
    """
    found: dict[int, dict[str, GpuTiming]] = {batch: {} for batch in batches}
    loads: list[LoadRow] = []
    left_out: dict[str, str] = {}
    with report.progress(f"bench: {device}", len(names), "contender") as progress:
        for name in names:
            network: Any = None
            try:
                start = time.perf_counter()
                network = _load(name, subject, device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                loaded, size = time.perf_counter() - start, weight_bytes(network)
                network = contender_network(name, network)
                for batch in batches:
                    inputs = [on_device(each, dtype_of(name), device) for each in subject.inputs(batch)]
                    found[batch][name] = timing = measured(name, network, inputs, seconds)
                    if batch == batches[0]:
                        peak = None if timing.peak_bytes is None else size + timing.peak_bytes
                        loads.append(LoadRow(name, loaded, loaded + timing.ready, peak, None, size))
            except Exception as error:
                if name == OURS:
                    raise
                left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            del network
            _free(device)
            progress.advance(note=name)
    return {str(batch): _rows(timings) for batch, timings in found.items()}, loads, left_out


def _load(name: str, subject: Subject, device: torch.device) -> torch.nn.Module:
    from dqtool.bench.reference import float_network as exported_float
    from dqtool.runtimes import load

    if name.startswith(OURS):
        return quantized_network(load(subject.directory, "simulate"), device)
    return float_network(exported_float(subject), dtype_of(name), device)


def _free(device: torch.device) -> None:
    """Free the memory of a network, and what `torch.compile` keeps of it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _rows(timings: dict[str, GpuTiming]) -> list[SpeedRow]:
    """Return one row a contender, fastest first; `ratio` is the speedup over eager float32."""
    base = timings.get(BASELINE)
    return [
        SpeedRow(
            name, each.median / 1e3, each.p10 / 1e3, each.p90 / 1e3, each.calls,
            None if base is None else base.median / each.median, GPU_CONTENDERS[name], name == BASELINE,
        )
        for name, each in sorted(timings.items(), key=lambda item: item[1].median)
    ]  # fmt: skip

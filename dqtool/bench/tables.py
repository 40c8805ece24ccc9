"""Report of a benchmark as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dqtool import report
from dqtool.artifacts.bench_report import AloneRow, BenchReport, KernelRow, LoadRow, RooflineRow, SpeedRow

__all__ = ["report_lines"]

MIB = 1 << 20
STEADY = 1.5
"""Largest ratio of p90 to p10 of trustworthy figures; above it, the report warns."""


def report_lines(result: BenchReport) -> list[str]:
    """Return the report's head and tables."""
    model, machine = result.model, result.machine
    flags = "unknown" if machine.flags is None else ", ".join(machine.flags) or "none of those that matter"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    lines = [
        f"network    {model.class_name}, {model.parameters / 1e6:.1f} M parameters, {model.bits}, "
        f"{model.file_bytes / MIB:.1f} MiB on disk ({model.origin})",
        f"processor  {machine.processor}, {machine.threads} of {machine.cores} cores; {flags}",
        f"expect     {machine.expect}",
        f"versions   {versions}",
        f"command    {result.command}",
    ]
    if result.gpu:
        lines.insert(1, f"gpu        {result.gpu}")
    for batch, rows in result.speed.items():
        lines += ["", f"One step, batch {batch} ({_baseline_text(rows)})", *_speed_table(rows)]
        if unsteady := [row.contender for row in rows if row.p90 > STEADY * row.p10]:
            lines.append(f"unsteady, something else is running on this machine: {', '.join(unsteady)}")
    for batch, alone in result.alone.items():
        lines += [
            "",
            f"Each in a process of its own, batch {batch}; memory above the level after imports",
            *_alone_table(alone),
        ]
    if result.roofline:
        lines += [
            "",
            "Kernels of the cpu runtime, one step; of the peak: products done, against those on operands in the caches",
        ]
        lines += _roofline_table(result.roofline)
    if result.scaling:
        lines += ["", "One step of the cpu runtime by threads", *_scaling_table(result.scaling)]
    lines += [f"left out: {name}: {why}" for name, why in result.left_out.items()]
    if result.kernels:
        lines += [
            "",
            f"Products of one step, batch {result.load_batch}: predicted by occupancy and bytes, with the share of the device's limit",
            *_kernel_table(result.kernels),
        ]
    if result.load and result.gpu:
        lines += ["", f"Loading and memory of the GPU, batch {result.load_batch}", *_gpu_table(result.load)]
    elif result.load:
        lines += [
            "",
            f"Loading and memory, each in a fresh process, caches warm, batch {result.load_batch}; memory above the level "
            "after imports",
            "float weights are mapped and read by the first step only, so loads compare by `with first step`",
            *_load_table(result.load),
        ]
    lines += [f"{name}: in memory a weight takes {form}" for name, form in result.weights_in_memory.items()]
    return lines


def _baseline_text(rows: Sequence[SpeedRow]) -> str:
    base = next((row.contender for row in rows if row.baseline), None)
    return f"ratios to {base}" if base else "no ratios without fp32 in --against"


def _speed_table(rows: Sequence[SpeedRow]) -> list[str]:
    columns = ["contender", "median ms", "p10", "p90", "calls", "times faster"]
    cells = [
        [
            f"{row.contender} ({row.note})" if row.note else row.contender,
            *(f"{seconds * 1000:.1f}" for seconds in (row.median, row.p10, row.p90)),
            row.calls,
            None if row.ratio is None else f"{row.ratio:.2f}x",
        ]
        for row in rows
    ]
    return report.table_lines(columns, cells)


def _alone_table(rows: Sequence[AloneRow]) -> list[str]:
    columns = ["contender", "ms", "processor ms", "calls", "peak MiB", "file MiB", "times faster"]
    cells = [
        [
            row.contender,
            f"{row.wall * 1000:.1f}",
            f"{row.processor * 1000:.1f}",
            row.calls,
            *(None if size is None else f"{size / MIB:.0f}" for size in (row.peak_bytes, row.file_bytes)),
            None if row.ratio is None else f"{row.ratio:.2f}x",
        ]
        for row in rows
    ]
    return report.table_lines(columns, cells)


def _roofline_table(rows: Sequence[RooflineRow]) -> list[str]:
    columns = ["kind", "calls", "of the step", "ms", "GOP/s", "of the peak", "MiB moved", "bound by"]
    cells = [
        [
            row.kind,
            row.calls or None,
            f"{row.share:.1%}",
            f"{row.seconds * 1000:.1f}",
            None if row.rate is None else f"{row.rate / 1e9:.0f}",
            None if row.of_peak is None else f"{row.of_peak:.0%}",
            None if row.moved is None else f"{row.moved / MIB:.0f}",
            row.bound,
        ]
        for row in rows
    ]
    return report.table_lines(columns, cells)


def _kernel_table(rows: Sequence[KernelRow]) -> list[str]:
    columns = ["products", "rows x columns x codes", "block", "us", "of the limit", "bound by"]
    cells = [
        [
            row.count,
            f"{row.rows} x {row.columns} x {row.codes}",
            row.block,
            f"{row.seconds * 1e6:.1f}",
            f"{row.reached:.0%}",
            row.bound,
        ]
        for row in rows
    ]
    total = sum(row.seconds for row in rows)
    least = sum(row.seconds * row.reached for row in rows)
    cells.append([sum(row.count for row in rows), "all", "", f"{total * 1e6:.1f}", f"{least / total:.0%}", ""])
    return report.table_lines(columns, cells)


def _gpu_table(rows: Sequence[LoadRow]) -> list[str]:
    columns = ["contender", "load s", "with first step s", "weights MiB", "peak MiB"]
    cells = [
        [
            row.contender,
            f"{row.load:.2f}",
            f"{row.ready:.2f}",
            *(None if size is None else f"{size / MIB:.0f}" for size in (row.weight_bytes, row.peak_bytes)),
        ]
        for row in rows
    ]
    return report.table_lines(columns, cells)


def _scaling_table(scaling: Mapping[str, float]) -> list[str]:
    first = next(iter(scaling.values()))
    cells = [[n, f"{seconds * 1000:.1f}", f"{first / seconds:.2f}x"] for n, seconds in scaling.items()]
    return report.table_lines(["threads", "ms", "times faster"], cells)


def _load_table(rows: Sequence[LoadRow]) -> list[str]:
    base = next((row for row in rows if row.contender == "fp32"), None)
    columns = ["contender", "load s", "with first step s", "peak MiB", "of fp32's", "without mapped files MiB"]
    cells = []
    for row in rows:
        line: list[object] = [row.contender, f"{row.load:.2f}", f"{row.ready:.2f}"]
        peak, private = row.peak_bytes, row.private_bytes
        line.append(None if peak is None else f"{peak / MIB:.0f}")
        line.append(f"{peak / base.peak_bytes:.2f}x" if peak is not None and base and base.peak_bytes else None)
        line.append(None if private is None else f"{private / MIB:.0f}")
        cells.append(line)
    return report.table_lines(columns, cells)

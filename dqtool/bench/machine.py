"""Instruction sets of the processor that matter for integer arithmetic, and the speedup to expect of them."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from dqtool.artifacts.bench_report import MachineRecord
from dqtool.artifacts.manifest import installed_versions

__all__ = ["FLAGS", "describe_machine", "expectation", "has_int8_dot_products"]

FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm")
"""Instruction sets that determine the speed of int8 and bf16 products, under the names that Linux uses."""

PACKAGES = ("dqtool", "torch", "diffusers", "openvino", "nncf")
CPUINFO = Path("/proc/cpuinfo")


def describe_machine(threads: int) -> MachineRecord:
    """Return processor, instruction sets among `FLAGS` (None if unknown), threads, and versions of packages."""
    name, flags = _cpuinfo()
    return MachineRecord(
        processor=name or platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        threads=threads,
        flags=flags,
        expect=expectation(flags),
        platform=platform.platform(),
        versions={"python": platform.python_version(), **installed_versions(PACKAGES)},
    )


def expectation(flags: list[str] | None) -> str:
    """Return a line on the speedup that int8 can have over float32 with these instruction sets."""
    if flags is None:
        return (
            "The system does not say which instruction sets the processor has; the table below shows what int8 gains."
        )
    if "amx_int8" in flags:
        return "AMX: int8 products at up to 16 times float32's rate; operations that stay in float limit the gain."
    if "avx512_vnni" in flags or "avx_vnni" in flags:
        return (
            "VNNI without AMX: int8 products at up to 4 times float32's rate (bf16: 2 times, where avx512_bf16 is listed); "
            "whole steps gain less, since normalization, activations and softmax stay in float."
        )
    if "asimddp" in flags or "i8mm" in flags:
        return "ARM dot-product instructions: `simulate` and `openvino` run here; the `cpu` runtime is for x86."
    return (
        "Neither AMX nor VNNI: an int8 product takes several instructions here and reaches two to four times float32's rate. "
        "Expect steps about three times as fast as float32's at 4 bits and twice at 8; bf16 is no faster than float32."
    )


def has_int8_dot_products() -> bool:
    """Return whether int8 products add up in 32 bits (VNNI, AMX, ARM). AVX2's own saturate in 16 bits."""
    return bool({"avx_vnni", "avx512_vnni", "amx_int8", "asimddp"} & set(_cpuinfo()[1] or ()))


def _cpuinfo() -> tuple[str | None, list[str] | None]:
    """Return (model name, flags among `FLAGS`). Either is None if the system does not tell it."""
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, _, value = line.partition(":")
        fields[key.strip().lower()] = value.strip()
    listed = fields.get("flags") or fields.get("features")
    present = None if listed is None else set(listed.split())
    return fields.get("model name"), None if present is None else [flag for flag in FLAGS if flag in present]

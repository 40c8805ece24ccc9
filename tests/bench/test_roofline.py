"""Roofline: operations and bytes of every kind of kernel are those of the network, and shares add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run
from helpers import load_json

from dqtool.bench import roofline
from dqtool.bench.roofline import counted, peak_rate
from dqtool.nn.integer import IntegerLayer, Operand
from dqtool.runtimes.cpu import library
from dqtool.runtimes.cpu.codes import GELU, CurrentStep
from dqtool.runtimes.cpu.native_product import NativeProduct

needs_kernels = pytest.mark.skipif(not library.has_products(), reason="no kernels")


def layer(co: int, ci: int, kernel: int, bits: int) -> IntegerLayer:
    """Return a layer of random codes; kernel 0 makes a linear one."""
    half = 2 ** (bits - 1)
    weight = torch.randint(-half, half, (co, ci, kernel, kernel) if kernel else (co, ci), dtype=torch.int8)
    operand = Operand(bits, torch.tensor([0.1]), torch.tensor([half], dtype=torch.int32))
    around = (kernel // 2,) * 2
    return IntegerLayer(operand, weight, torch.rand(co), torch.randn(co), None, bool(kernel), padding=around)


@needs_kernels
def test_operations_of_the_calls() -> None:
    with counted() as found:
        conv = NativeProduct(layer(32, 16, 5, 8), CurrentStep())  # never a Winograd transform
        conv(torch.randn(2, 16, 6, 5))
        first, second = (NativeProduct(layer(co, ci, 0, 4), CurrentStep()) for co, ci in ((64, 32), (8, 64)))
        second.multiply(first.feed(first.quantize(torch.randn(10, 32)), second, GELU))
    assert found["3x3 convolution"].operations == 2 * 2 * 6 * 5 * 32 * 16 * 25
    assert found["3x3 convolution"].moved == 2 * 10 * 9 * 16 + 32 * 16 * 25 + 4 * 2 * 6 * 5 * 32
    assert found["linear to codes"].operations == 2 * 10 * 32 * 64
    assert found["1x1 convolution and linear"].operations == 2 * 10 * 64 * 8
    assert found["quantizer"].calls == 2 and found["quantizer"].operations == 0
    assert library.get() is not None and not hasattr(library.get(), "found")


@needs_kernels
def test_peak_is_a_rate_that_a_processor_can_have() -> None:
    assert 1e9 < peak_rate(4) < 1e15


@needs_kernels
def test_the_report_of_a_step(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "COPY", 1 << 16)
    options = (
        "--runtime",
        "none",
        "--against",
        "none",
        "--batch",
        "1",
        "--seconds",
        "0",
        "--no-memory",
        "--roofline",
        "--sample-size",
        "12",
    )
    found = load_json(run("bench", *options, "--json", cwd=made).stdout)
    rows = {row["kind"]: row for row in found["roofline"]}
    whole = rows.pop("whole step")
    assert whole["share"] == 1 and sum(row["share"] for row in rows.values()) == pytest.approx(1)
    assert {"attention", "everything else"} <= set(rows)
    assert all(row["seconds"] <= whole["seconds"] for row in rows.values())
    assert all(row["bound"] in ("products", "memory", "the rest") for row in rows.values() if row["rate"])
    assert "1" in found["scaling"]
    assert "--sample-size 12" in found["command"] and "--roofline" in found["command"]
    text = run("bench", *options, "--quiet", cwd=made).stdout
    assert "of the peak" in text and "threads" in text

"""Description of the processor, for processors of several kinds."""

from __future__ import annotations

from pathlib import Path

import pytest

from dqtool.bench import machine
from dqtool.bench.machine import describe_machine, expectation


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["avx2", "avx512_vnni", "amx_int8"], "AMX"),
        (["avx2", "avx_vnni"], "VNNI without AMX"),
        (["avx2"], "Neither AMX nor VNNI"),
        (["asimddp"], "ARM"),
        ([], "Neither"),
        (None, "does not say"),
    ],
)
def test_what_to_expect(flags: list[str] | None, words: str):
    assert words in expectation(flags)


def test_flags_come_from_the_first_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor : 0\nmodel name : Some CPU\nflags : fpu avx2 avx_vnni sse\n\nprocessor : 1\nflags : avx512f\n"
    )
    monkeypatch.setattr(machine, "CPUINFO", info)
    found = describe_machine(3)
    assert (found.processor, found.flags, found.threads) == ("Some CPU", ["avx2", "avx_vnni"], 3)
    assert {"python", "torch", "dqtool"} <= set(found.versions)


def test_a_system_without_that_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    found = describe_machine(1)
    assert found.flags is None
    assert found.processor

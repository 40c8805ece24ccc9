"""`MemoryMeter` records memory that was allocated and freed inside its context."""

from __future__ import annotations

import gc
import sys

import pytest
import torch

from dqtool.core.allocator import return_freed_memory
from dqtool.core.memory import MemoryMeter, resident

MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="counted by the Linux kernel")
def test_peaks_are_seen_above_the_level() -> None:
    gc.collect()  # memory that earlier tests left behind would be reused and not counted
    return_freed_memory()
    with MemoryMeter(resident()) as meter:
        held = torch.ones(64 * MIB, dtype=torch.uint8)
        meter._look()
        del held
    figures = meter.figures()
    assert 60 * MIB < figures["peak_anonymous_bytes"] < 100 * MIB
    assert figures["peak_memory_bytes"] >= figures["peak_anonymous_bytes"] - MIB


def test_nothing_is_claimed_where_nothing_can_be_measured() -> None:
    with MemoryMeter(None) as meter:
        pass
    assert meter.figures() == {}

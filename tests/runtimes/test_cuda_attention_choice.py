"""int8 or half-precision attention: the faster one is taken, kept for the device, and named."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels of the cuda runtime are written in Triton")

from dqtool.runtimes import attention_times
from dqtool.runtimes.cuda import attention_choice, launch, ops
from dqtool.runtimes.cuda.attention_choice import VARIABLE, half_is_faster, known_choices


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DQTOOL_CACHE", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    attention_choice.known_choices.cache_clear()
    yield
    attention_choice.known_choices.cache_clear()


def operands(dtype: torch.dtype = torch.float16) -> Any:
    torch.manual_seed(0)
    return (torch.randn(2, 3, 5, 8).to(dtype), torch.randn(2, 3, 7, 8).to(dtype), torch.randn(2, 3, 7, 8).to(dtype))


@pytest.mark.parametrize("winner", ["int8", "half precision"])
def test_the_faster_one_is_timed_once_and_kept(winner: str) -> None:
    q, k, _ = operands()
    calls: list[str] = []

    def take(name: str) -> None:
        calls.append(name)
        time.sleep(0 if name == winner else 2e-3)

    for fresh in (False, True):
        if fresh:
            attention_choice.known_choices.cache_clear()  # another process starts without it
        found = half_is_faster(q, k, None, lambda: take("int8"), lambda: take("half precision"))
        assert found == (winner == "half precision")
    assert len(calls) == 2 * (1 + attention_choice.CALLS)
    (choice,) = known_choices("cpu").values()
    assert choice.taken == winner and choice.size == "6 heads of 8, 5 queries, 7 keys, float16"
    (line,) = attention_times.summary()
    assert line.startswith(f"attention on cpu: {int(winner == 'int8')} of 1 sizes in int8")
    assert ("half precision, which is faster there: 6 heads of 8" in line) == (winner != "int8")


def test_float32_and_the_variable_need_no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> None:
        raise AssertionError("timed")

    q, k, _ = operands(torch.float32)
    assert not half_is_faster(q, k, None, never, never)
    for value, expected in (("int8", False), ("half", True)):
        monkeypatch.setenv(VARIABLE, value)
        assert half_is_faster(q.half(), k.half(), None, never, never) == expected


def test_the_operation_computes_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = operands(torch.bfloat16)
    mask = torch.zeros(2, 1, 1, 7)
    mask[1, ..., 3:] = -10000.0
    monkeypatch.setattr(launch, "attend", lambda *_: "int8")
    rest = (torch.empty(0),) * 4
    monkeypatch.setenv(VARIABLE, "int8")
    assert ops.attention(q, k, v, mask, *rest, 0.5, 15) == "int8"
    monkeypatch.setenv(VARIABLE, "half")
    expected = F.scaled_dot_product_attention(q, k, v, mask.bfloat16(), scale=0.5).transpose(1, 2).flatten(2)
    assert torch.equal(ops.attention(q, k, v, mask, *rest, 0.5, 15), expected)

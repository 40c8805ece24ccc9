"""Check of the GPU's kernels before use: exact sums pass; wrong ones, and kernels that fail, are the reason to run elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels of the cuda runtime are written in Triton")

from dqtool.runtimes.cuda import launch
from dqtool.runtimes.cuda.self_check import fault_of


@pytest.fixture(autouse=True)
def _fresh() -> None:
    fault_of.cache_clear()


def test_exact_sums_pass() -> None:
    assert fault_of("cpu") is None


def test_one_wrong_sum_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    right = launch.multiply_codes

    def wrong(codes: Any, weight: Any, *rest: Any, **options: Any) -> Any:
        out = right(codes, weight, *rest, **options)
        out.view(-1)[-1] += 1
        return out

    monkeypatch.setattr(launch, "multiply_codes", wrong)
    assert fault_of("cpu") == "its kernels compute wrong sums on this device (at 4 bits); please report this"


def test_kernels_that_fail_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such\ninstruction")

    monkeypatch.setattr(launch, "multiply_codes", fail)
    assert fault_of("cpu") == "its kernels don't run on this device (RuntimeError: no such instruction)"


@pytest.mark.parametrize("worst", ["one row", "not a number"])
def test_wrong_attention_is_a_reason(worst: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = launch.attend

    def wrong(*arguments: Any) -> Any:
        out = right(*arguments)
        out[-1, -1] = float("nan") if worst == "not a number" else 0.0
        return out

    monkeypatch.setattr(launch, "attend", wrong)
    assert fault_of("cpu") == "its kernels compute wrong attention on this device; please report this"


def test_attention_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(launch, "attend", fail)
    assert fault_of("cpu") == "its kernels don't run on this device (RuntimeError: no such instruction)"

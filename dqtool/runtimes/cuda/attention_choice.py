"""Choice between int8 attention and a half-precision product of PyTorch (flash attention), by their times on the device at hand.

Both are timed when a size of attention first runs on a device with half precision between products, once: the winner is kept in
`$DQTOOL_CACHE`, by device and versions, and `dqtool inspect` names it. Half precision leaves the operands of both products
unrounded. `DQTOOL_CUDA_ATTENTION=int8` or `half` makes the choice instead: the same everywhere, for comparisons.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtool.runtimes.attention_times import Choice, keep, kept

__all__ = ["VARIABLE", "half_is_faster", "half_precision", "known_choices"]

VARIABLE = "DQTOOL_CUDA_ATTENTION"

HALF = (torch.float16, torch.bfloat16)

CALLS = 5
"""Calls of each that are timed, after one that is not."""


def half_precision(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, factor: float) -> Tensor:
    """Return the attention of `[N, H, S, D]` operands without quantizers, `[N, S, H * D]`, by PyTorch's fastest kernel."""
    if mask is not None:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask, scale=factor)
    return out.transpose(1, 2).flatten(2)


def half_is_faster(q: Tensor, k: Tensor, mask: Tensor | None, int8: Callable[[], Any], half: Callable[[], Any]) -> bool:
    """Return whether half precision was faster for these sizes on the device of `q`. The first call for a size times both.

    A network that computes in float32 between products stays on int8, and so does a size that nobody timed before a CUDA graph
    is recorded: nothing can be timed there.
    """
    asked = os.environ.get(VARIABLE, "auto")
    if q.dtype not in HALF or asked == "int8":
        return False
    if asked == "half":
        return True
    key = _size(q, k, mask)
    device = _device_name(q.device)
    known = known_choices(device)
    if key not in known:
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # streams and events are the current device's
            if q.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            known[key] = Choice(device, key, _seconds(int8, q.device), _seconds(half, q.device))
        keep(device, _versions(), known.values())
    return known[key].taken != "int8"


def _size(q: Tensor, k: Tensor, mask: Tensor | None) -> str:
    n, h, sq, d = q.shape
    kind = str(q.dtype).removeprefix("torch.")
    return f"{n * h} heads of {d}, {sq} queries, {k.shape[2]} keys, {kind}{', masked' if mask is not None else ''}"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def known_choices(device: str) -> dict[str, Choice]:
    """Return what is known of a device: what earlier processes timed, and this one adds."""
    return kept(device, _versions())


def _versions() -> str:
    import triton

    return f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Return the median seconds of a call."""
    run()
    times = []
    for _ in range(CALLS):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            run()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times)

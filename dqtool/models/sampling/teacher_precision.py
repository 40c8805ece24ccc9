"""Precision and memory format in which the float network samples and answers on a GPU.

Half precision is taken where it loses nothing (its predictions agree with float32's to `LEAST` decibels) and is faster, and
channels-last memory where that is faster. Both are measured on a few samples before the network is first used. On the CPU nothing is
measured, and the network stays in float32. `DQTOOL_TEACHER` (see `dqtool.core.device`) makes the choice instead.

The choice holds for calls through `Sampler`. What trains a block reads the float32 outputs of the same block.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dqtool import distributed, report
from dqtool.artifacts.jsonvalues import Json
from dqtool.core.device import asked_teacher, device_of
from dqtool.models.families import Family

__all__ = ["LEAST", "Form", "Measured", "choose", "computed", "precision_label", "settle", "sure_points"]

LEAST = 60.0
"""Least PSNR, in decibels, of the predictions of each sample. Quantization to 8 bits leaves 40 to 50, so that a loss of this size
changes its figures in the second decimal."""

MOST = 200.0
"""Decibels of predictions that are equal."""

FASTER = 1.05
"""Least speedup for which the network leaves float32 and the memory format that it has."""

POINTS, SAMPLES, ROUNDS = 3, 2, 3
"""Timesteps, samples of each, and timed rounds of a measurement."""

ACCELERATORS = ("cuda",)

HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types in the order of their precision: the first that loses nothing is taken."""

KEY = "_dqtool_half"
"""Attribute of a network that samples in half precision: the dtype's name."""

Point = tuple[Tensor, Tensor, Mapping[str, Tensor]]
"""Inputs of the network: samples `[N, ...]`, timestep, conditions `[N, ...]`."""


@dataclass(frozen=True)
class Form:
    """A way to run a network: a dtype by name, and whether its tensors are channels-last."""

    dtype: str = "float32"
    channels_last: bool = False


@dataclass(frozen=True)
class Measured:
    """A form, the PSNR of its worst sample in decibels, and its speedup over float32 in the network's own memory format."""

    form: Form
    psnr: float = MOST
    speedup: float = 1.0


def settle(network: nn.Module, family: Family, points: Sequence[Point], name: str) -> dict[str, Json]:
    """Choose the form of a float network, put it into it, and report it in one line. Return the metrics `NAME_precision`, `NAME_psnr`
    and `NAME_speedup` where it left float32; empty where it did not.

    `points` are inputs to measure on. All processes of a command take the choice of the main one.
    """
    asked, device = asked_teacher(), device_of(network)
    if asked == "float32" or (asked == "auto" and device.type not in ACCELERATORS):
        return {}
    if asked != "auto":
        network.__dict__[KEY] = asked
        report.say(f"{name}: the full-precision network computes in {asked}, as asked")
        return {f"{name}_precision": asked}
    calls = [lambda point=point: family.predict(network, *point) for point in points]
    found = distributed.broadcast(choose(network, calls) if distributed.is_main() else Measured(Form()))
    _take(network, found.form)
    kind = found.form.dtype + (", channels-last" if found.form.channels_last else "")
    told = f" ({found.speedup:.2f}x of float32, {found.psnr:.1f} dB)" if found.form != Form() else ""
    report.say(f"{name}: the full-precision network computes in {kind}{told}")
    if found.form.dtype == "float32":
        return {}
    return {f"{name}_precision": found.form.dtype, f"{name}_psnr": found.psnr, f"{name}_speedup": found.speedup}


@torch.no_grad()
def choose(network: nn.Module, calls: Sequence[Callable[[], Tensor]]) -> Measured:
    """Return the fastest form that agrees with float32 to `LEAST` decibels on `calls`, which run the network on a few samples each.

    The network is left in float32 and in the memory format that it had.
    """
    exact = [call() for call in calls]
    took = _seconds(network, calls)
    best = Measured(Form())
    formats = (False, True) if any(isinstance(m, nn.Conv2d) for m in network.modules()) else (False,)
    for channels_last in formats:
        for dtype in ("float32", *HALF):
            form = Form(dtype, channels_last)
            if form == Form():
                continue
            _take(network, form)
            quality = min(map(_agreement, exact, (computed(network, call) for call in calls)))
            if quality >= LEAST:
                speedup = took / _seconds(network, calls)
                if speedup >= FASTER * best.speedup:
                    best = Measured(form, quality, speedup)
                if dtype != "float32":
                    break  # the next type is as fast and less precise
    _take(network, Form())
    return best


def computed(network: nn.Module, call: Callable[..., Tensor], *given: Any) -> Tensor:
    """Return `call(*given)`, which runs the network, in the precision that was chosen for it, float32."""
    name = network.__dict__.get(KEY)
    if name is None:
        return call(*given)
    with _autocast(device_of(network), HALF[name]):
        return call(*given).float()


def precision_label(network: nn.Module) -> str:
    """Return what names of kept calls and images end with, so that those of two precisions never mix; empty for float32."""
    name = network.__dict__.get(KEY)
    return "" if name is None else f" in {name}"


def sure_points(timesteps: Tensor, x: Tensor, conditions: Mapping[str, Tensor]) -> list[Point]:
    """Return the samples `x` at the first, the middle and the last of `timesteps` `[T]`, to measure on."""
    rows = torch.linspace(0, len(timesteps) - 1, min(POINTS, len(timesteps))).round().long()
    return [(x, timesteps[row], conditions) for row in rows]


def _take(network: nn.Module, form: Form) -> None:
    """Put the network into a form. Its own memory format is the contiguous one."""
    network.__dict__.pop(KEY, None)
    if form.dtype != "float32":
        network.__dict__[KEY] = form.dtype
    wanted = torch.channels_last if form.channels_last else torch.contiguous_format
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            weight: Any = module.weight
            if not weight.is_contiguous(memory_format=wanted):
                weight.data = weight.data.contiguous(memory_format=wanted)


def _autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype) if torch.amp.is_autocast_available(device.type) else nullcontext()


def _agreement(exact: Tensor, found: Tensor) -> float:
    """Return the PSNR in decibels of the worst sample; minus infinity where one is not finite. The peak is the range of `exact`."""
    error = (found.float() - exact).square().flatten(1).mean(1)
    span = exact.flatten(1).amax(1) - exact.flatten(1).amin(1)
    worst = float((10 * torch.log10(span.square() / error)).min())
    return -math.inf if math.isnan(worst) else min(worst, MOST)


def _seconds(network: nn.Module, calls: Sequence[Callable[[], Tensor]]) -> float:
    """Return the median seconds of all calls, the device's work included."""
    device = device_of(network)
    times = []
    for _round in range(ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        for call in calls:
            computed(network, call)
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first round finds kernels and memory


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

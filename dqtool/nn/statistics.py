"""Activation statistics of calibration: one histogram per quantizer and step, which serves every bit-width.

A quantizer belongs to a layer's input (rotated and divided by its dilation, where it has them) or to an attention operand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from dqtool.core.affine import search_histogram
from dqtool.core.bits import AttentionBits
from dqtool.core.rotation import rotate
from dqtool.distributed import gather, rank, world_size
from dqtool.graph.attention import PRODUCTS, attention_layout
from dqtool.graph.leaves import input_of
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.attention import OPERANDS, QuantAttnProcessor
from dqtool.nn.processors import lend_processor
from dqtool.nn.steps import StepIndex

__all__ = ["BINS", "channel_ranges", "collect", "initial_tables", "occurrences"]

BINS = 512
"""Bins of a histogram, which spans the step's own range."""
PIECE = 1 << 18
"""Values counted at a time, so that intermediate results stay in the processor's cache."""


class Rows(Protocol):
    """Store for the statistics of finished steps, such as `dqtool.artifacts.Checkpoints`."""

    found: dict[int, dict[str, Tensor]]

    def add(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Store the statistics of step `index`."""


class _Recorder:
    """Recorder of one step: ranges `[H, 2]` in a first pass over its samples, histograms `[H, BINS]` in a second."""

    def __init__(self) -> None:
        self.ranges: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        self.counting = False

    def see(self, name: str, rows: Tensor) -> None:
        """Record values `rows` `[H, n]` of the quantizer's H parts (heads)."""
        if not self.counting:
            lo, hi = torch.aminmax(rows, dim=1)
            new = torch.stack([lo, hi], 1)
            old = self.ranges.get(name, new)
            self.ranges[name] = torch.stack(
                [torch.minimum(old[:, 0], new[:, 0]), torch.maximum(old[:, 1], new[:, 1])], 1
            )
            return
        lo, hi = self.ranges[name].unbind(1)
        width = ((hi - lo) / BINS).clamp(min=torch.finfo(rows.dtype).tiny)
        first = torch.arange(len(rows), dtype=torch.int32, device=rows.device)[:, None] * BINS
        counts = self.counts.setdefault(name, torch.zeros(len(rows), BINS, dtype=torch.int64, device=rows.device))
        for part in rows.split(max(1, PIECE // len(rows)), 1):
            bins = ((part - lo[:, None]) / width[:, None]).to(torch.int32).clamp_(0, BINS - 1)
            bins += first
            counts += occurrences(bins.flatten(), counts.numel()).view(len(rows), BINS)

    def see_channels(self, name: str, x: Tensor, channel_dim: int) -> None:
        """Record the range `[2, C]` of each in-channel of a layer's undivided input at this step."""
        dims = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
        new = torch.stack([x.amin(dims), x.amax(dims)])
        old = self.channels.get(name, new)
        self.channels[name] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])


def occurrences(values: Tensor, size: int, on_cpu: bool | None = None) -> Tensor:
    """Return how often each of the integers 0 to `size - 1` is among `values` `[n]` int32, as int64 `[size]`.

    `on_cpu` chooses the form, by default that of the device. PyTorch's `bincount` is the faster one on a CPU, and makes the
    host wait for a GPU, which it asks for the largest value.
    """
    if values.device.type == "cpu" if on_cpu is None else on_cpu:
        return torch.bincount(values, minlength=size)
    found = torch.zeros(size, dtype=torch.int64, device=values.device)
    return found.index_add_(0, values, torch.ones_like(values, dtype=torch.int64))


class _ObservingProcessor(QuantAttnProcessor):
    """Float attention processor that passes its operands to a recorder."""

    def __init__(self, name: str, recorder: _Recorder, layout: str) -> None:
        super().__init__(AttentionBits(8, 8), StepIndex(torch.zeros(1)), layout)
        self.name, self.recorder = name, recorder

    def quantize(self, attn: nn.Module, name: str, x: Tensor) -> Tensor:
        """Record `x` and return it unchanged."""
        for sample in x:  # without a copy of all probabilities
            self.recorder.see(f"{self.name}.{name}", sample.flatten(1))
        return x


@torch.no_grad()
def channel_ranges(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    steps: Iterable[Callable[[], None]],
    kept: Rows | None = None,
) -> dict[str, Tensor]:
    """Return only the `Q.channel_range` entries of `collect`, running each of `steps` once instead of twice."""
    recorder = _Recorder()
    handles = []
    for info in layers:
        if info.kind != "attention" and info.shares is None:

            def hook(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Tensor],
                name: str = info.name,
                channel_dim: int = 1 if info.kind == "conv2d" else -1,
            ) -> None:
                recorder.see_channels(name, input_of(args, kwargs), channel_dim)

            handles.append(model.get_submodule(info.name).register_forward_pre_hook(hook, with_kwargs=True))

    def measure(run: Callable[[], None]) -> dict[str, Tensor]:
        recorder.channels = {}
        run()
        return {name: span.cpu() for name, span in recorder.channels.items()}

    try:
        found = _each_step(steps, measure, kept)
    finally:
        for handle in handles:
            handle.remove()
    return {f"{name}.channel_range": _widest([each[name] for each in found]) for name in (found[0] if found else {})}


def _each_step(
    steps: Iterable[Callable[[], None]], measure: Callable[[Callable[[], None]], dict[str, Tensor]], kept: Rows | None
) -> list[Mapping[str, Tensor]]:
    """Return what `measure` finds at each step, in order. Where several processes share a command, each takes a step at a
    time."""
    found: list[Mapping[str, Tensor]] = []
    waiting: list[Callable[[], None]] = []

    def take_turns() -> None:
        mine = measure(waiting[rank()]) if rank() < len(waiting) else {}
        for row in gather(mine)[: len(waiting)]:
            if kept is not None:
                kept.add(len(found), row)
            found.append(row)
        waiting.clear()

    for index, run in enumerate(steps):
        if kept is not None and index in kept.found:
            found.append(kept.found[index])
            continue
        waiting.append(run)
        if len(waiting) == world_size():
            take_turns()
    if waiting:
        take_turns()
    return found


def _widest(spans: Sequence[Tensor]) -> Tensor:
    """Return the range `[2, C]` over the ranges of all steps."""
    both = torch.stack(list(spans))  # [T, 2, C]
    return torch.stack([both[:, 0].amin(0), both[:, 1].amax(0)])


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    dilation: Mapping[str, Tensor],
    steps: Iterable[Callable[[], None]],
    kept: Rows | None = None,
) -> dict[str, Tensor]:
    """Run the float `model` and return, for each quantizer Q, `Q.histogram` int32 `[T, (H,) BINS]`, `Q.range` `[T, (H,) 2]`
    and, for layers, `Q.channel_range` `[2, C_in]` over all steps.

    `steps` yields one function per denoising step, in table order; each call runs `model` over that step's samples, and
    every function is called twice. Layers that share another layer's input have no entry. `kept` holds the statistics
    that an earlier run stored for the first steps, and stores those of this run.
    """
    recorder = _Recorder()
    handles = []
    restore: list[Callable[[], None]] = []
    for info in layers:
        module = model.get_submodule(info.name)
        if info.kind == "attention":
            layout = attention_layout(module) or PRODUCTS
            restore.append(lend_processor(module, _ObservingProcessor(info.name, recorder, layout)))
        elif info.shares is None:
            channel_dim = 1 if info.kind == "conv2d" else -1
            divisor = dilation.get(info.name)
            if divisor is not None and info.kind == "conv2d":
                divisor = divisor.view(-1, 1, 1)

            def hook(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                kwargs: dict[str, Tensor],
                name: str = info.name,
                channel_dim: int = channel_dim,
                divisor: Tensor | None = divisor,
                rotation: int = info.rotation,
            ) -> None:
                x = input_of(args, kwargs)
                divisor = None if divisor is None else divisor.to(x.device)
                if not recorder.counting:
                    recorder.see_channels(name, x, channel_dim)
                x = rotate(x, rotation, channel_dim)
                recorder.see(name, (x if divisor is None else x / divisor).reshape(1, -1))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def measure(run: Callable[[], None]) -> dict[str, Tensor]:
        recorder.ranges, recorder.counts, recorder.channels, recorder.counting = {}, {}, {}, False
        run()
        recorder.counting = True
        run()
        row = {f"{name}.range": span.cpu() for name, span in recorder.ranges.items()}
        row |= {f"{name}.histogram": count.to(torch.int32).cpu() for name, count in recorder.counts.items()}
        return row | {f"{name}.channel_range": span.cpu() for name, span in recorder.channels.items()}

    try:
        rows = _each_step(steps, measure, kept)
    finally:
        for handle in handles:
            handle.remove()
        for give_back in restore:
            give_back()
    attention = {f"{info.name}.{operand}" for info in layers if info.kind == "attention" for operand in OPERANDS}
    result: dict[str, Tensor] = {}
    for full in rows[0] if rows else {}:
        name, _, kind = full.rpartition(".")
        if kind == "channel_range":
            result[full] = _widest([row[full] for row in rows])
        else:
            values = torch.stack([row[full] for row in rows])
            result[full] = values if name in attention else values[:, 0]
    return result


def initial_tables(
    plans: Sequence[LayerPlan], statistics: Mapping[str, Tensor], static: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the activation tables (scale, zero point) of least squared error, keyed as `assign_tables` takes them.

    `[T]` for layers and `[T, H]` for attention operands; with `static` one row that serves all steps (T = 1).
    """
    tables = {}
    for plan in plans:
        if isinstance(plan.bits, AttentionBits):
            for operand in OPERANDS:
                bits = plan.bits.of(operand)
                if bits < 16:
                    key = f"{plan.info.name}.{operand}"
                    tables[key] = _table(statistics, key, bits, symmetric=operand != "probs", static=static)
        elif plan.bits.quantizes_input and plan.info.shares is None:
            tables[plan.info.name] = _table(statistics, plan.info.name, plan.bits.input, False, static)
    return tables


def _table(
    statistics: Mapping[str, Tensor], name: str, bits: int, symmetric: bool, static: bool
) -> tuple[Tensor, Tensor]:
    histogram, span = statistics[f"{name}.histogram"], statistics[f"{name}.range"]
    if static:
        histogram, span = _pool(histogram, span)
    rows = histogram.flatten(0, -2)
    lo, hi = span.flatten(0, -2).unbind(1)
    symmetric = symmetric and bits == 8
    scale, zero_point = search_histogram(rows, lo, hi, bits, symmetric)
    return scale.view(histogram.shape[:-1]), zero_point.view(histogram.shape[:-1])


def _pool(histogram: Tensor, span: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the histograms of all steps into one over the widest range: `[1, (H,) BINS]`, `[1, (H,) 2]`."""
    lo, hi = span[..., 0].amin(0), span[..., 1].amax(0)  # [(H)]
    width = ((hi - lo) / BINS).clamp(min=torch.finfo(torch.float32).tiny)
    own = (span[..., 1] - span[..., 0]) / BINS  # [T, (H)]
    centres = span[..., :1] + (torch.arange(BINS) + 0.5) * own[..., None]
    bins = ((centres - lo[..., None]) / width[..., None]).long().clamp(0, BINS - 1)
    pooled = torch.zeros(histogram.shape, dtype=torch.int64).scatter_add_(-1, bins, histogram.long()).sum(0)
    return pooled[None], torch.stack([lo, hi], -1)[None]

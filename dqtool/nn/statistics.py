"""What calibration keeps of the activations: histograms per quantizer and step, from which any bit-width starts.

One quantizer is one layer's input (divided by its dilation) or one attention operand. Nothing here depends on bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dqtool.core.affine import search_histogram
from dqtool.core.bits import AttentionBits
from dqtool.graph.attention import attention_layout
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import LayerPlan
from dqtool.nn.attention import OPERANDS, QuantAttnProcessor
from dqtool.nn.steps import StepIndex

__all__ = ["BINS", "channel_ranges", "collect", "initial_tables"]

BINS = 512
"""Bins of a histogram, over that step's own range."""


class _Recorder:
    """Ranges `[H, 2]` in a first pass over a step's samples, histograms `[H, BINS]` in a second."""

    def __init__(self) -> None:
        self.ranges: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor] = {}
        self.channels: dict[str, Tensor] = {}
        self.counting = False

    def see(self, name: str, rows: Tensor) -> None:
        """`rows` is `[H, n]`: the values of each of the quantizer's H parts."""
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
        bins = ((rows - lo[:, None]) / width[:, None]).long().clamp_(0, BINS - 1)
        bins += torch.arange(len(rows), device=rows.device)[:, None] * BINS
        counts = torch.bincount(bins.flatten(), minlength=len(rows) * BINS).view(len(rows), BINS)
        self.counts[name] = self.counts.get(name, 0) + counts

    def see_channels(self, name: str, x: Tensor, channel_dim: int) -> None:
        """Range of each in-channel of a layer's (undivided) input, over all steps: `[2, C]`."""
        dims = [d for d in range(x.dim()) if d != channel_dim % x.dim()]
        new = torch.stack([x.amin(dims), x.amax(dims)])
        old = self.channels.get(name, new)
        self.channels[name] = torch.stack([torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])])


class _ObservingProcessor(QuantAttnProcessor):
    """Computes float attention and shows its operands to a recorder."""

    def __init__(self, name: str, recorder: _Recorder, layout: str) -> None:
        super().__init__(AttentionBits(8, 8), StepIndex(torch.zeros(1)), layout)
        self.name, self.recorder = name, recorder

    def quantize(self, attn: nn.Module, name: str, x: Tensor) -> Tensor:
        """Record, change nothing."""
        self.recorder.see(f"{self.name}.{name}", x.transpose(0, 1).flatten(1))
        return x


@torch.no_grad()
def channel_ranges(
    model: nn.Module, layers: Sequence[LayerInfo], steps: Iterable[Callable[[], None]]
) -> dict[str, Tensor]:
    """Of `collect` the `Q.channel_range` alone, which takes one run of each of `steps` instead of two."""
    recorder = _Recorder()
    handles = []
    for info in layers:
        if info.kind != "attention" and info.shares is None:

            def hook(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                name: str = info.name,
                channel_dim: int = 1 if info.kind == "conv2d" else -1,
            ) -> None:
                recorder.see_channels(name, args[0], channel_dim)

            handles.append(model.get_submodule(info.name).register_forward_pre_hook(hook))
    try:
        for run in steps:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {f"{name}.channel_range": found.cpu() for name, found in recorder.channels.items()}


@torch.no_grad()
def collect(
    model: nn.Module,
    layers: Sequence[LayerInfo],
    dilation: Mapping[str, Tensor],
    steps: Iterable[Callable[[], None]],
) -> dict[str, Tensor]:
    """Run the float `model` and return, for each quantizer Q, `Q.histogram` int32 `[T, (H,) BINS]`, `Q.range` `[T, (H,) 2]`
    and, for layers, `Q.channel_range` `[2, C_in]` over all steps.

    `steps` yields one function per denoising step, in table order; calling it runs `model` over that step's samples
    (it is called twice). Layers that share an input with another have no entry of their own.
    """
    recorder = _Recorder()
    handles, processors = [], {}
    for info in layers:
        module = model.get_submodule(info.name)
        if info.kind == "attention":
            processors[info.name] = module.processor
            layout = attention_layout(module) or "single"
            module.set_processor(_ObservingProcessor(info.name, recorder, layout))  # type: ignore[operator]
        elif info.shares is None:
            channel_dim = 1 if info.kind == "conv2d" else -1
            divisor = dilation.get(info.name)
            if divisor is not None and info.kind == "conv2d":
                divisor = divisor.view(-1, 1, 1)

            def hook(
                _module: nn.Module,
                args: tuple[Tensor, ...],
                name: str = info.name,
                channel_dim: int = channel_dim,
                divisor: Tensor | None = divisor,
            ) -> None:
                x = args[0]
                divisor = None if divisor is None else divisor.to(x.device)
                if not recorder.counting:
                    recorder.see_channels(name, x, channel_dim)
                recorder.see(name, (x if divisor is None else x / divisor).reshape(1, -1))

            handles.append(module.register_forward_pre_hook(hook))
    ranges: dict[str, list[Tensor]] = {}
    counts: dict[str, list[Tensor]] = {}
    try:
        for run in steps:
            recorder.ranges, recorder.counts, recorder.counting = {}, {}, False
            run()
            recorder.counting = True
            run()
            for name in recorder.ranges:
                ranges.setdefault(name, []).append(recorder.ranges[name].cpu())
                counts.setdefault(name, []).append(recorder.counts[name].cpu())
    finally:
        for handle in handles:
            handle.remove()
        for name, processor in processors.items():
            model.get_submodule(name).set_processor(processor)  # type: ignore[operator]
    attention = {f"{info.name}.{operand}" for info in layers if info.kind == "attention" for operand in OPERANDS}
    result: dict[str, Tensor] = {}
    for name in ranges:
        histogram, span = torch.stack(counts[name]).to(torch.int32), torch.stack(ranges[name])
        result[f"{name}.histogram"] = histogram if name in attention else histogram[:, 0]
        result[f"{name}.range"] = span if name in attention else span[:, 0]
        if name in recorder.channels:
            result[f"{name}.channel_range"] = recorder.channels[name].cpu()
    return result


def initial_tables(
    plans: Sequence[LayerPlan], statistics: Mapping[str, Tensor], static: bool = False
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activation tables (scale, zero point) of least squared error, keyed as `assign_tables` wants them.

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

"""Gradient scale of LSQ (section 2.2 of arXiv 1902.08153): the gradient of a quantizer's scale is divided by sqrt(N ·
Q)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dqtool.core.affine import levels
from dqtool.graph.attention import own_processor
from dqtool.nn.layers import FakeQuantLayer
from dqtool.training.data import DistillationTask

__all__ = ["gradient_scale", "scaled_gradients"]


def gradient_scale(count: int, bits: int) -> float:
    """Return `1 / sqrt(N · Q)` of a scale that quantizes N = `count` values with Q = 2^bits - 1."""
    return 1 / math.sqrt(count * levels(bits))


@contextmanager
def scaled_gradients(task: DistillationTask) -> Iterator[None]:
    """Multiply the gradients of all of the student's scales by `gradient_scale` inside the context.

    N is the number of values that one entry of a scale quantizes: the weights of an out-channel, the features of a
    layer's input, or the values of one attention head's operand.
    """
    counts: dict[nn.Parameter, float] = {}
    features = _input_features(task)
    for layer, count in features.items():
        if isinstance(layer.weight_scale, nn.Parameter):
            counts[layer.weight_scale] = gradient_scale(layer.weight[0].numel(), layer.bits.weight)
        if isinstance(layer.input_scale, nn.Parameter):
            counts[layer.input_scale] = gradient_scale(count, layer.bits.input)
    for info in task.trace.layers:
        if info.kind == "attention":
            module = task.student.get_submodule(info.name)
            queries, keys, inner = info.shape
            values = {"q": queries * inner, "k": keys * inner, "v": keys * inner}
            for name in ("q", "k", "v", "probs"):
                scale = getattr(module, f"{name}_scale", None)
                if isinstance(scale, nn.Parameter):
                    count = values[name] // info.heads if name in values else queries * keys
                    bits = own_processor(module).bits.of(name)
                    counts[scale] = gradient_scale(count, bits)

    def times(factor: float) -> object:
        def hook(gradient: Tensor) -> Tensor:
            return gradient * factor

        return hook

    handles = [p.register_hook(times(factor)) for p, factor in counts.items() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_features(task: DistillationTask) -> dict[FakeQuantLayer, int]:
    """Return the number of values in each layer's input, for one sample."""
    layers = [m for m in task.student.modules() if isinstance(m, FakeQuantLayer)]
    found = {layer: layer.weight[0].numel() for layer in layers}
    original = FakeQuantLayer.quantize_input

    def look(self: FakeQuantLayer, x: Tensor) -> Tensor:
        found[self] = x[0].numel()
        return original(self, x)

    # Layers that share an input are called together, so forward hooks would miss some of them.
    FakeQuantLayer.quantize_input = look  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            task.predict(task.student, torch.zeros(1, dtype=torch.long))
    finally:
        FakeQuantLayer.quantize_input = original  # type: ignore[method-assign]
    return found

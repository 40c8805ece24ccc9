"""Linear layers with one input, such as the projections to queries, keys and values, as one layer."""

from __future__ import annotations

import torch

from dqtool.nn.branch import merge_branches
from dqtool.nn.integer import IntegerLayer, PackedCodes

__all__ = ["merge"]


def merge(layers: list[IntegerLayer]) -> IntegerLayer | None:
    """Return one layer that computes several linear layers of one input, their outputs side by side.

    Return None if their inputs differ in width or are quantized differently.
    """
    first = layers[0]
    assert first.input is not None
    for other in layers[1:]:
        a, b = first.input, other.input
        if other.weight.shape[1] != first.weight.shape[1] or other.rotation != first.rotation:
            return None
        if b is None or (a.bits, a.lowest) != (b.bits, b.lowest) or (a.divisor is None) != (b.divisor is None):
            return None
        if not (torch.equal(a.scale, b.scale) and torch.equal(a.zero_point, b.zero_point)):
            return None
        if a.divisor is not None and b.divisor is not None and not torch.equal(a.divisor, b.divisor):
            return None
    like = first.input.scale
    biases = [
        like.new_zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias.to(torch.float32)
        for layer in layers
    ]
    source = _merge_packed([layer.source for layer in layers])
    if source is None:
        weight = torch.cat([layer.unpacked().weight for layer in layers])
    else:
        weight = torch.empty(source.shape, dtype=torch.int8, device="meta")
    return IntegerLayer(
        input=first.input,
        weight=weight,
        weight_scale=torch.cat([layer.weight_scale for layer in layers if layer.weight_scale is not None]),
        bias=None if all(layer.bias is None for layer in layers) else torch.cat(biases),
        divisor=first.divisor,
        is_conv=False,
        source=source,
        rotation=first.rotation,
        low_rank=merge_branches([layer.low_rank for layer in layers], [layer.weight.shape[0] for layer in layers]),
    )


def _merge_packed(sources: list[PackedCodes | None]) -> PackedCodes | None:
    """Return the packed weights below one another; None if one is not packed or their bits differ."""
    packed = [source for source in sources if source is not None]
    if len(packed) < len(sources) or len({source.bits for source in packed}) > 1:
        return None
    rows = sum(source.shape[0] for source in packed)
    return PackedCodes(
        torch.cat([source.words for source in packed]),
        torch.cat([source.zero_points for source in packed]),
        packed[0].bits,
        torch.Size((rows, *packed[0].shape[1:])),
    )

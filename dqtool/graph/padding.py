"""What a convolution pads with: only zeros, as many on either side, are exact in integers."""

from __future__ import annotations

from torch import nn

__all__ = ["zero_padding"]


def zero_padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros above and below, left and right; None where the sides differ or something else is there."""
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        height, width = layer.padding
        return int(height), int(width)
    if layer.padding == "valid":
        return 0, 0
    whole = [taps * (size - 1) for taps, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(n % 2 for n in whole) else (whole[0] // 2, whole[1] // 2)

"""The leaf modules that dqtool quantizes: linear layers, and convolutions whose padding has an exact integer form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["input_of", "is_quantizable", "zero_padding"]


def is_quantizable(module: nn.Module) -> bool:
    """Return whether `module` is a leaf that dqtool quantizes."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and zero_padding(module) is not None)


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a call of a leaf; some networks pass it by its name, `layer(input=x)`."""
    found: Tensor = args[0] if args else kwargs["input"]
    return found


def zero_padding(layer: nn.Conv2d) -> tuple[int, int] | None:
    """Return the rows and columns of zeros on either side of a convolution's input.

    Return None if the two sides differ or the padding holds other values: neither is exact in integers.
    """
    if layer.padding_mode != "zeros":
        return None
    if not isinstance(layer.padding, str):
        height, width = layer.padding
        return int(height), int(width)
    if layer.padding == "valid":
        return 0, 0
    whole = [taps * (size - 1) for taps, size in zip(layer.dilation, layer.kernel_size, strict=True)]
    return None if any(n % 2 for n in whole) else (whole[0] // 2, whole[1] // 2)

"""Running a network of dilated weights in float: every scaled layer sees `x / s`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["divide_inputs", "scaled_inputs"]


def divide_inputs(network: nn.Module, scales: Mapping[str, Tensor]) -> list:
    """Hook every layer named in `scales` so that it divides its input by its factors `[C_in]`; returns the handles."""
    handles = []
    for name, scale in scales.items():
        layer = network.get_submodule(name)
        factor = scale.reciprocal().view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else scale.reciprocal()

        def divide(_layer: nn.Module, args: tuple, factor: Tensor = factor) -> tuple:
            return (args[0] * factor, *args[1:])

        handles.append(layer.register_forward_pre_hook(divide))
    return handles


@contextmanager
def scaled_inputs(network: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, the layers named in `scales` divide their inputs."""
    handles = divide_inputs(network, scales)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

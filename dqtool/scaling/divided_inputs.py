"""Running a network of dilated weights in float: every scaled layer sees `x / s`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

__all__ = ["divide_inputs", "other_parameters", "scaled_inputs"]


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


@contextmanager
def other_parameters(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, every module runs on `tensors[name]` instead of its own parameters, which it has back afterwards.

    A tensor is asked for when its module runs and let go of when that is done, so deferred ones are in memory one
    module at a time.
    """
    handles, aside = [], []

    def enter(module: nn.Module, _args: tuple, *, prefix: str) -> None:
        own = dict(module._parameters)
        for name, parameter in own.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(tensors[f"{prefix}{name}"], requires_grad=False)
        aside.append((module, own))

    def leave(module: nn.Module, *_: object) -> None:
        if aside and aside[-1][0] is module:
            module._parameters.update(aside.pop()[1])

    try:
        for name, module in network.named_modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                hook = partial(enter, prefix=f"{name}." if name else "")
                handles.append(module.register_forward_pre_hook(hook))
                handles.append(module.register_forward_hook(leave))
        yield
    finally:
        for handle in handles:
            handle.remove()
        while aside:
            module, own = aside.pop()
            module._parameters.update(own)

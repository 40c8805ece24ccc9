"""The check that scaling changed nothing: the scaled network on divided inputs gives the original's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dqtool.artifacts.jsonvalues import ForeignConfig
from dqtool.core.device import to_device_of
from dqtool.core.rotation import rotate
from dqtool.errors import NumericError
from dqtool.graph.leaves import input_of
from dqtool.models.families import Family
from dqtool.nn.prediction import prediction_of

__all__ = ["TOLERANCE", "check_equivalence", "divided_inputs", "replaced_parameters", "rotated_inputs"]

TOLERANCE = 1e-5
"""Largest allowed |scaled - original| relative to the output's largest magnitude: float32 round-off."""


def check_equivalence(
    network: nn.Module,
    scaled: Callable[[], Mapping[str, Tensor]],
    scales: Mapping[str, Tensor],
    family: Family,
    config: ForeignConfig,
    given: str,
    rotations: Mapping[str, int] | None = None,
) -> float:
    """Return max |y' - y| / max |y| on a random input at a random step; `network`, the original, is left as it was.

    y' is the output with the tensors that `scaled()` returns, on inputs divided by `scales` and rotated by `rotations`;
    `scaled` is called after y is computed. `given` names the network in an error.

    Raises:
        NumericError: the difference is more than round-off.
    """
    arguments = to_device_of(network, family.example(family.proof_config(config)))
    onednn = torch.backends.mkldnn.enabled
    # oneDNN would bring every weight into a layout of its own, which takes longer than one product with it.
    torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
    try:
        with torch.no_grad():
            original = prediction_of(network(**arguments, return_dict=False))
            with (
                divided_inputs(network, to_device_of(network, scales)),
                rotated_inputs(network, rotations or {}),
                replaced_parameters(network, scaled()),
            ):
                changed = prediction_of(network(**arguments, return_dict=False))
    finally:
        torch.backends.mkldnn.enabled = onednn
    error = float((changed - original).abs().max() / original.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    if not error <= TOLERANCE:
        raise NumericError(
            f"The dilated network's output differs from the original's by {error:.2g} relative, more than {TOLERANCE:g}",
            where=given,
            fix="A layer's input range may exceed what float32 resolves; lower --cap",
        )
    return error


@contextmanager
def divided_inputs(network: nn.Module, scales: Mapping[str, Tensor]) -> Iterator[None]:
    """Divide the inputs of the layers named in `scales` by their factors `[C_in]` while the context is active."""
    handles = []
    for name, scale in scales.items():
        layer = network.get_submodule(name)
        factor = scale.reciprocal().view(-1, 1, 1) if isinstance(layer, nn.Conv2d) else scale.reciprocal()

        def divide(
            _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], factor: Tensor = factor
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            others = {name: value for name, value in kwargs.items() if name != "input"}
            return (input_of(args, kwargs) * factor, *args[1:]), others

        handles.append(layer.register_forward_pre_hook(divide, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def rotated_inputs(network: nn.Module, rotations: Mapping[str, int]) -> Iterator[None]:
    """Rotate the inputs of the layers named in `rotations`, in groups of that many channels, while the context is active."""
    handles = []
    for name, size in rotations.items():
        layer = network.get_submodule(name)

        def turn(
            layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], size: int = size
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            others = {name: value for name, value in kwargs.items() if name != "input"}
            return (rotate(input_of(args, kwargs), size, 1 if isinstance(layer, nn.Conv2d) else -1), *args[1:]), others

        handles.append(layer.register_forward_pre_hook(turn, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_parameters(network: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Run every module on `tensors[name]` instead of its own parameters while the context is active.

    A tensor is read when its module runs and released when that is done, so deferred tensors are in memory one module at
    a time.
    """
    handles, saved = [], []

    def enter(module: nn.Module, _args: tuple[Any, ...], *, prefix: str) -> None:
        own = dict(module._parameters)
        for name, parameter in own.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(tensors[f"{prefix}{name}"], requires_grad=False)
        saved.append((module, own))

    def leave(module: nn.Module, *_: object) -> None:
        if saved and saved[-1][0] is module:
            module._parameters.update(saved.pop()[1])

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
        while saved:
            module, own = saved.pop()
            module._parameters.update(own)

"""Helpers of formats that trace a network: its inputs, their dynamic dimensions, and silenced warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dqtool.nn.traceable import flat_arguments

__all__ = ["dynamic_axes", "quiet_tracing", "traced_arguments"]

_FREE = {
    1: {0: "batch"},
    3: {0: "batch", 1: "sequence"},
    4: {0: "batch", 2: "height", 3: "width"},
}


def traced_arguments(example: Mapping[str, Any], time: str = "timestep") -> dict[str, Tensor]:
    """Return the flat inputs of the graph: the tensors of `example`, with the argument `time` as float32 `[1]`."""
    tensors = flat_arguments(example)
    return {**tensors, time: tensors[time].reshape(-1)[:1].to(torch.float32)}


def dynamic_axes(tensor: Tensor, traced_size: bool = False) -> dict[int, str]:
    """Return the dynamic dimensions of an input by name: batch, height and width of images, length of sequences.

    With `traced_size`, height and width of images are fixed.
    """
    free = _FREE.get(tensor.dim(), {0: "batch"})
    return {0: free[0]} if traced_size and tensor.dim() == 4 else free


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Silence the tracers' warnings about Python values, which are constants of the network's configuration."""
    loggers = [logging.getLogger(name) for name in ("openvino", "torch.onnx")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)

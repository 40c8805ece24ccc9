"""Contenders on a CUDA device, and their timing: events of the device, not the clock of the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

__all__ = [
    "GPU_CONTENDERS",
    "GpuTiming",
    "contender_network",
    "float_network",
    "measured",
    "on_device",
    "quantized_network",
    "weight_bytes",
]

GPU_CONTENDERS = {
    "ours": "dqtool cuda, float16 between products, eager",
    "ours-graph": "the same in a CUDA graph",
    "fp32": "float32, eager, channels last",
    "fp16": "float16, eager, channels last",
    "fp16-graph": "the same in a CUDA graph",
    "fp16-compile": 'float16, torch.compile(mode="reduce-overhead")',
    "ours-compile": 'dqtool cuda, torch.compile(mode="reduce-overhead")',
    "fp16-max-autotune": 'float16, torch.compile(mode="max-autotune")',
    "torchao-int8": "torchao int8 dynamic, torch.compile, where installed",
}
"""Contenders by name, in the order in which they are timed: what matters most comes first."""

MODES = {"compile": "reduce-overhead", "autotune": "max-autotune"}


@dataclass(frozen=True)
class GpuTiming:
    """Milliseconds of one step (median, 10th and 90th percentile), seconds of the first step, bytes at the peak beside the weights."""

    median: float
    p10: float
    p90: float
    ready: float
    peak_bytes: int


def quantized_network(packed: nn.Module) -> nn.Module:
    """Return a packed network on the cuda runtime, with float16 between products."""
    from dqtool.runtimes import cuda

    return cuda.convert(packed.to("cuda")).to(torch.float16)


def float_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a float network in `dtype` and channels last, ready to run."""
    placed: Any = network.to("cuda", dtype).eval().requires_grad_(False)
    found: nn.Module = placed.to(memory_format=torch.channels_last)
    return found


def contender_network(name: str, network: Any) -> Any:
    """Return `network` as the contender `name` calls it: itself, compiled, or quantized by another library.

    Raises:
        ImportError: the library is not installed.
    """
    if name == "torchao-int8":
        if find_spec("torchao") is None:
            raise ImportError("torchao is not installed")
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(network, Int8DynamicActivationInt8WeightConfig())  # the last contender: it changes the network
        return torch.compile(network, mode="max-autotune")
    mode = MODES.get(name.rpartition("-")[2])
    return network if mode is None else torch.compile(network, mode=mode)


def weight_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def on_device(arguments: Any, dtype: torch.dtype) -> Any:
    """Return arguments on the CUDA device, floating tensors but the timestep in `dtype`."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to("cuda")
        return value.to(dtype) if value.is_floating_point() else value

    return {key: value.to("cuda") if key == "timestep" else tree_map(move, value) for key, value in arguments.items()}


def measured(name: str, network: Any, inputs: list[dict[str, Any]], seconds: float) -> GpuTiming:
    """Time the steps of a contender for about `seconds` after the warm-up."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()

    def step(number: int) -> Any:
        with torch.no_grad():
            return network(**inputs[number % len(inputs)], return_dict=False)[0]

    output = step(0)
    torch.cuda.synchronize()
    ready = time.perf_counter() - start
    if not bool(output.isfinite().all()):
        raise FloatingPointError(f"{name}: the output is not finite")
    for number in range(3):
        step(number)
    run = _captured(network, inputs[0]) if name.endswith("-graph") else step
    times = list(_timed(run, seconds))
    deciles = statistics.quantiles(times, n=10)
    peak = torch.cuda.max_memory_allocated() - before
    return GpuTiming(statistics.median(times), deciles[0], deciles[-1], ready, peak)


def _captured(network: Any, arguments: dict[str, Any]) -> Callable[[int], Any]:
    """Return a replay of one step in a CUDA graph. A capture fails if anything in the step waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(2):
            network(**arguments, return_dict=False)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        network(**arguments, return_dict=False)
    return lambda _number: graph.replay()


def _timed(step: Callable[[int], Any], seconds: float) -> Iterator[float]:
    """Yield milliseconds of steps until `seconds` have passed, at least ten times."""
    end, number = time.perf_counter() + seconds, 0
    while number < 10 or time.perf_counter() < end:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        step(number)
        last.record()
        last.synchronize()
        number += 1
        yield first.elapsed_time(last)

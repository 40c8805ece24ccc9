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

from dqtool.bench.gpu_names import GPU_CONTENDERS

__all__ = [
    "GPU_CONTENDERS",
    "PEERS",
    "GpuTiming",
    "contender_network",
    "dtype_of",
    "float_network",
    "measured",
    "missing",
    "on_device",
    "quantized_network",
    "weight_bytes",
]

WARM_UP, LEAST_STEPS = 3, 10
"""Steps before timing, and the least number of timed ones."""

GRAPH = "-graph"
"""End of the names of contenders that replay one step as a CUDA graph."""

PEERS = {"sdnq-int8": "sdnq", "torchao-int8": "torchao"}
"""Packages of contenders, which change the float network that they are given."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of contenders by the beginning of their names; float16 for all others."""

MODES = {"compile": "reduce-overhead", "autotune": "max-autotune"}


@dataclass(frozen=True)
class GpuTiming:
    """Milliseconds of one step (median, 10th and 90th percentile), seconds of the first step, bytes at the peak beside the weights
    (None: not counted), and steps that were timed."""

    median: float
    p10: float
    p90: float
    ready: float
    peak_bytes: int | None
    calls: int = 0


def dtype_of(name: str) -> torch.dtype:
    """Return the dtype of a contender's inputs."""
    return DTYPES.get(name.split("-")[0], torch.float16)


def missing(name: str, device: torch.device) -> str | None:
    """Return why a contender can't run here, or None."""
    if name.endswith(GRAPH) and device.type != "cuda":
        return "CUDA graphs need a CUDA device"
    package = PEERS.get(name)
    return f"pip install {package}" if package is not None and find_spec(package) is None else None


def quantized_network(packed: nn.Module, device: str | torch.device = "cuda") -> nn.Module:
    """Return a packed network on the cuda runtime, with float16 between products."""
    from dqtool.runtimes import cuda

    return cuda.convert(packed.to(device)).to(torch.float16)


def float_network(network: nn.Module, dtype: torch.dtype, device: str | torch.device = "cuda") -> nn.Module:
    """Return a float network in `dtype` and channels last, ready to run."""
    placed: Any = network.to(device, dtype).eval().requires_grad_(False)
    found: nn.Module = placed.to(memory_format=torch.channels_last)
    return found


def contender_network(name: str, network: Any) -> Any:
    """Return `network` as the contender `name` calls it: itself, compiled, or quantized by another library.

    Raises:
        ImportError: the library is not installed.
    """
    if name in PEERS and find_spec(PEERS[name]) is None:
        raise ImportError(f"{PEERS[name]} is not installed")
    if name == "torchao-int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(network, Int8DynamicActivationInt8WeightConfig())  # in place
        return torch.compile(network, mode="max-autotune")
    if name == "sdnq-int8":
        from sdnq import sdnq_post_load_quant

        return sdnq_post_load_quant(network, weights_dtype="int8", use_quantized_matmul=True)
    mode = MODES.get(name.rpartition("-")[2])
    return network if mode is None else torch.compile(network, mode=mode)


def weight_bytes(network: nn.Module) -> int:
    """Return the bytes of a network's parameters and buffers."""
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def on_device(arguments: Any, dtype: torch.dtype, device: str | torch.device = "cuda") -> Any:
    """Return arguments on the device, floating tensors but the timestep in `dtype`."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(device)
        return value.to(dtype) if value.is_floating_point() else value

    return {key: value.to(device) if key == "timestep" else tree_map(move, value) for key, value in arguments.items()}


def measured(name: str, network: Any, inputs: list[dict[str, Any]], seconds: float) -> GpuTiming:
    """Time the steps of a contender for about `seconds` after the warm-up, on the device of its inputs.

    Raises:
        FloatingPointError: the output is not finite.
    """
    device = next(value for value in inputs[0].values() if isinstance(value, Tensor)).device
    before = _restart_peak(device)
    start = time.perf_counter()

    def step(number: int) -> Any:
        with torch.no_grad():
            return network(**inputs[number % len(inputs)], return_dict=False)[0]

    output = step(0)
    finite = bool(output.isfinite().all())  # waits for the device
    ready = time.perf_counter() - start
    if not finite:
        raise FloatingPointError(f"{name}: the output is not finite")
    for number in range(WARM_UP):
        step(number)
    run = _captured(network, inputs[0]) if name.endswith(GRAPH) else step
    times = list(_timed(run, seconds, device))
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    peak = None if before is None else torch.cuda.max_memory_allocated(device) - before
    return GpuTiming(statistics.median(times), deciles[0], deciles[-1], ready, peak, len(times))


def _restart_peak(device: torch.device) -> int | None:
    """Start to measure the peak of a CUDA device's memory; returns the bytes in use, None for another device."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


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
        kept = network(**arguments, return_dict=False)
    held = (graph, kept, arguments)  # a replay reads and writes their memory
    return lambda _number: held[0].replay()


def _timed(step: Callable[[int], Any], seconds: float, device: torch.device) -> Iterator[float]:
    """Yield milliseconds of steps until `seconds` have passed, at least `LEAST_STEPS` times."""
    end, number = time.perf_counter() + seconds, 0
    while number < LEAST_STEPS or time.perf_counter() < end:
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            step(number)
            last.record()
            last.synchronize()
            yield first.elapsed_time(last)
        else:
            start = time.perf_counter()
            step(number)
            yield 1e3 * (time.perf_counter() - start)
        number += 1

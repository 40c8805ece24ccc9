"""Estimates of time, memory and disk for a run of all stages, made before anything runs."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from dqtool.core.cost import replayed_together, together_for
from dqtool.report import format_seconds
from dqtool.stages.registry import make_options

if TYPE_CHECKING:
    from dqtool.stages.planning.activations import Activations
    from dqtool.stages.planning.network import PlannedNetwork

__all__ = ["estimate", "network_size", "on_gpus"]

START = 8.0
"""Seconds to import the libraries and load a model."""
PER_LAYER = 1e-4
"""Seconds that a layer takes beside its multiplications."""
CONVOLUTIONS = 0.4
"""Share of a matrix product's rate that the layers of a network reach."""
SIMULATED = 2.5
"""Time of a simulated quantized forward pass, in those of the float network."""
BATCH = 64
"""Samples that share the time beside multiplications."""
TRAINING = 3
"""Time of a forward and a backward pass, in forward passes."""
ROUNDS = 12
"""Matrix products that are timed."""
LIBRARIES = 700 << 20
"""Memory of the imported libraries in bytes."""


def estimate(
    stages: Mapping[str, Mapping[str, Any]], cached: Collection[str], device: str, packed: int
) -> dict[str, str]:
    """Return texts on time, memory and disk that the stages which are not cached will take, here and on known GPUs.

    For a network that does not run on shapes they say so, and no more.

    Time is counted in forward passes at the rate of this machine, measured by a matrix product; on other GPUs at the float32 rates of their data sheets. The order of magnitude is
    right, the second digit is not: training, scaling and file systems differ.

    Args:
        stages: options of the five stages by field name.
        cached: stages whose output is there.
        device: `--device`.
        packed: bytes of the quantized network.
    """
    from dqtool.core.device import resolve_device
    from dqtool.stages.options.calibrate import with_steps
    from dqtool.stages.options.distill import corrects_predictions, method_and_options
    from dqtool.stages.planning.network import PlannedNetwork

    network = PlannedNetwork.of(make_options("dilate", stages["dilate"]))
    source, activations = network.source, network.activations
    size = network_size(network)
    if size is None or activations is None:
        return {"time": f"unknown, since {source.class_name} does not run on shapes alone, as a plan needs"}
    macs, layers = size
    weights = sum(prod(entry["shape"]) for entry in source.tensor_entries().values())
    calibrate, evaluate = make_options("calibrate", stages["calibrate"]), make_options("eval", stages["eval"])
    distill = make_options("distill", stages["distill"])
    _, recipe = method_and_options(distill)
    guided = network.calls_per_step(calibrate.guidance)
    calls = with_steps(calibrate, source.scheduler).steps or 1
    samples = 0 if calibrate.statistics is not None else calibrate.samples
    images = -(-samples // calls)
    steps = calls * guided
    trained = getattr(recipe, "iters", 0) * recipe.batch_size if hasattr(recipe, "batch_size") else 0
    refined = getattr(recipe, "refine_iters", 0) * getattr(recipe, "refine_batch_size", 0)
    corrected = 64 * steps * (1 + SIMULATED) if corrects_predictions(distill) else 0
    passes = {
        "dilate": 2.0,
        "calibrate": float(images * steps + 2 * samples * guided),
        "distill": corrected + TRAINING * SIMULATED * (trained + refined),
        "export": 0.0,
        "eval": evaluate.samples * steps * (1 + SIMULATED),
    }
    rate = CONVOLUTIONS * _matmul_rate(resolve_device(device))
    left = {stage: n for stage, n in passes.items() if stage not in cached}
    seconds = _seconds(left, macs, layers, rate)
    trains = bool(trained or refined)
    tensors = 4 * weights * (5 if trains else 3)
    working = partial(_working, activations, macs, guided, calibrate, distill if trains else None, evaluate, cached)
    place = resolve_device(device).type
    memory = LIBRARIES + (tensors if place == "cpu" else 4 * weights) + (distill.cache_memory << 20 if trains else 0)
    there = "" if place == "cpu" else f"; on the device {tensors / 1e9:.1f} GB"
    pairs = 4 * calibrate.samples * prod(network.family.sample_shape(network.config))
    disk = 2 * 4 * weights + pairs + 2 * packed
    return {
        "time": f"about {format_seconds(seconds)} on this machine",
        "memory": f"up to {memory / 1e9:.1f} GB{there}{_more(working(place))}",
        "gpus": on_gpus(left, macs, layers, tensors, working("cuda")),
        "disk": f"about {disk / 1e6:,.0f} MB, of which {packed / 1e6:,.1f} MB are the quantized network",
    }


def on_gpus(passes: Mapping[str, float], macs: int, layers: int, tensors: int, working: int = 0) -> str:
    """Return the projected time of forward `passes` on each known GPU, and the memory there that `tensors` bytes of weights,
    gradients and moments and `working` bytes of activations take.

    A GPU that is too small for the former is left out. On one that is too small for both, fewer samples run together.
    """
    from dqtool.runtimes.cuda.model import GPUS

    times = [
        f"{gpu.name} {format_seconds(_seconds(passes, macs, layers, CONVOLUTIONS * gpu.float_peak))}"
        for gpu in GPUS.values()
        if tensors < gpu.size * 1e9
    ]
    if not times:
        return f"none of the known ones has {tensors / 1e9:.1f} GB"
    with_it = f"{tensors / 1e9:.1f} GB of weights and moments{_more(working)}"
    return f"about {', '.join(times)} by their data sheets, with {with_it}"


def _more(working: int) -> str:
    """Return words on `working` bytes of activations. Where less is free, fewer samples run together."""
    return f", and up to {working / 1e9:.1f} GB of activations, or what is free" if working else ""


def _seconds(passes: Mapping[str, float], macs: int, layers: int, rate: float) -> float:
    """Return the seconds of forward passes of a network at `rate` multiply-accumulates a second."""
    return START + sum(n * (macs / rate + layers * PER_LAYER / BATCH) for n in passes.values())


def network_size(network: PlannedNetwork) -> tuple[int, int] | None:
    """Return multiply-accumulates of one forward pass, and the number of layers; None for a network that does not run on shapes."""
    from dqtool.core.quantization import QuantizationSpec

    found = network.forecast(QuantizationSpec.parse("4/4"), 1)
    return None if found is None else (found.macs, len(found.layers))


def _working(
    found: Activations,
    macs: int,
    guided: int,
    calibrate: Any,
    distill: Any,
    evaluate: Any,
    cached: Collection[str],
    device: str,
) -> int:
    """Return the most bytes of activations on a kind of device of the stages that are not cached; `distill` is None where it trains
    nothing."""
    from dqtool.stages.distill import LOW_MEMORY_BLOCK, SAMPLED_TOGETHER, TOGETHER
    from dqtool.stages.options.distill import method_and_options

    together = together_for(macs, 4 * calibrate.batch_size, device)
    sizes = {
        "calibrate": found.calibrating(max(guided * min(calibrate.batch_size, together), together)),
        "eval": found.calibrating(guided * together_for(macs, evaluate.batch_size, device)),
    }
    if distill is not None:
        recipe: Any = method_and_options(distill)[1]
        batch = max(getattr(recipe, "batch_size", 0), getattr(recipe, "refine_batch_size", 0))
        replayed = min(LOW_MEMORY_BLOCK if distill.low_memory else TOGETHER, replayed_together(macs, TOGETHER, device))
        sizes["distill"] = found.distilling(replayed, batch, together_for(macs, SAMPLED_TOGETHER, device))
    return max((size for stage, size in sizes.items() if stage not in cached), default=0)


def _matmul_rate(device: Any) -> float:
    """Return multiply-accumulates a second of a float32 matrix product."""
    import torch

    size = 512 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device)
    _ = float((a @ a)[0, 0])  # warm-up
    taken = []
    for _round in range(ROUNDS):  # the fastest counts: the first ones pay for memory, and other processes for some
        start = time.perf_counter()
        product = a @ a
        _ = float(product[0, 0])
        taken.append(time.perf_counter() - start)
    return size**3 / min(taken)

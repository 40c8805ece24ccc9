"""Choice of every layer's factors, from its weights alone or from calibration activations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool import report
from dqtool.core.bits import LayerBits
from dqtool.core.device import to_cpu, to_device_of
from dqtool.core.dilation import CAP
from dqtool.core.quantization import QuantizationSpec
from dqtool.distributed import gather, rank, world_size
from dqtool.graph.leaves import input_of
from dqtool.graph.trace import LayerInfo
from dqtool.nn.assignment import assign_bits
from dqtool.scaling.groups import Groups, scaling_groups
from dqtool.scaling.methods import Samples, ScalingInput, ScalingMethod, ScalingResult

__all__ = ["Activations", "choose_by_activations", "choose_by_weights"]


@dataclass(frozen=True)
class Activations:
    """Activations of the float network, for the methods that look at them.

    Attributes:
        ranges: minimum and maximum of each in-channel over all steps, `[2, C_in]`, by group owner.
        run: runs the network once on a few calibration points, ordered by denoising step.
        samples_per_step: the number of those points at each step.
    """

    ranges: Mapping[str, Tensor]
    run: Callable[[], object]
    samples_per_step: Sequence[int]


def choose_by_weights(
    network: nn.Module, layers: Iterable[LayerInfo], method: ScalingMethod, cap: float = CAP, threshold: float = 1.0
) -> dict[str, ScalingResult]:
    """Return the factors that a method chooses from the weights of each group, by owner.

    Groups whose factors are all 1 have no entry. `cap` and `threshold` are those of Weight Dilation.
    """
    found = {}
    for owner, members in scaling_groups(layers).items():
        result = method(ScalingInput(_weights(network, members), members[0].groups, cap=cap, threshold=threshold))
        if bool((result.scale != 1).any()):
            found[owner] = result
    return found


def choose_by_activations(
    network: nn.Module,
    layers: Sequence[LayerInfo],
    method: ScalingMethod,
    activations: Activations,
    bits: LayerBits,
    shiftable: Collection[str] = (),
    present: Mapping[str, ScalingResult] | None = None,
    cap: float = CAP,
    threshold: float = 1.0,
) -> dict[str, ScalingResult]:
    """Return the factors that a method chooses for each group of the float `network`, by owner.

    Groups that the method leaves unscaled have no entry, unless it wants their factors learned. A group that the sampled
    points don't reach keeps its `present` factors.

    Args:
        bits: of the layers, whose roles may raise them.
        shiftable: owners of the groups whose input can be shifted.
        present: factors that the groups have now, by owner.
        cap: as in `choose_by_weights`, as is `threshold`.

    Raises:
        UsageError: the statistics are of another network.
    """
    groups, present = scaling_groups(layers), present or {}

    def choose(owner: str, samples: Samples | None = None) -> ScalingResult:
        members = groups[owner]
        lo, hi = to_device_of(network, activations.ranges.get(owner, (None, None)))
        now = present.get(owner)
        result = method(
            ScalingInput(
                _weights(network, members),
                members[0].groups,
                lo,
                hi,
                cap,
                threshold,
                samples,
                shiftable=owner in shiftable,
                present=None if now is None else replace(now, scale=to_device_of(network, now.scale)),
            )
        )
        return replace(result, scale=to_cpu(result.scale), shift=to_cpu(result.shift))

    if method.needs_samples:
        found = _with_samples(network, groups, activations, layers, bits, choose)
        found = {owner: found.get(owner) or present[owner] for owner in groups if owner in found or owner in present}
    else:
        found = {owner: choose(owner) for owner in groups}
    return {
        owner: result
        for owner, result in found.items()
        if method.learning_rate or result.rotation or result.shift is not None or bool((result.scale != 1).any())
    }


def _weights(network: nn.Module, members: Iterable[LayerInfo]) -> list[Tensor]:
    return [network.get_parameter(f"{member.name}.weight").detach() for member in members]


def _with_samples(
    network: nn.Module,
    groups: Groups,
    activations: Activations,
    layers: Sequence[LayerInfo],
    bits: LayerBits,
    choose: Callable[[str, Samples | None], ScalingResult],
) -> dict[str, ScalingResult]:
    """Run the network on the sampled points and choose as each group's first layer runs, when its input is at hand. Where
    several processes share a command, they take the groups in turns."""
    plans = assign_bits(list(layers), QuantizationSpec(bits))
    planned = {plan.info.name: plan.bits for plan in plans if isinstance(plan.bits, LayerBits)}
    counts = activations.samples_per_step
    found: dict[str, ScalingResult] = {}
    mine = list(groups)[rank() :: world_size()]
    with report.progress("calibrate: scaling by output error", len(mine)) as progress:

        def see(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], owner: str) -> None:
            if owner in found:
                return  # the layer runs several times: its first input stands for all
            x = input_of(args, kwargs)
            if len(x) % sum(counts):
                return  # its input isn't one of the samples (a class embedder of one row, say)
            operations = [_operation(network.get_submodule(member.name)) for member in groups[owner]]
            parts = list(x.split([n * (len(x) // sum(counts)) for n in counts]))
            channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
            found[owner] = choose(owner, Samples(parts, operations, planned[owner], channel_dim))
            progress.advance()

        handles = [
            network.get_submodule(owner).register_forward_pre_hook(partial(see, owner=owner), with_kwargs=True)
            for owner in mine
        ]
        try:
            with torch.no_grad():
                activations.run()
        finally:
            for handle in handles:
                handle.remove()
    return {owner: result for part in gather(found) for owner, result in part.items()}


def _operation(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the layer as a function of input and weight, without bias."""
    if isinstance(layer, nn.Conv2d):
        geometry: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        return lambda x, weight: F.conv2d(x, weight, None, **geometry)
    return lambda x, weight: F.linear(x, weight)

"""How `dilate` finds every layer's scale: what the method asks to see, gathered from weights and a calibrated artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dqtool import report
from dqtool.artifacts import Artifact
from dqtool.core.bits import LayerBits, parse_bits
from dqtool.core.device import beside, main_memory
from dqtool.errors import UsageError
from dqtool.graph.trace import LayerInfo
from dqtool.models.families import Family
from dqtool.nn.surgery import assign_bits
from dqtool.scaling.folding import Fold
from dqtool.scaling.groups import Groups, scaling_groups
from dqtool.scaling.methods import Samples, ScalingInput, ScalingMethod, ScalingResult
from dqtool.training.data import Trajectory

__all__ = ["choose_scaling", "statistics_for"]

STEPS, PER_STEP = 8, 2
"""Of the recorded trajectory: steps, and points of each, whose layer inputs the searching methods look at."""


def choose_scaling(
    network: nn.Module,
    family: Family,
    layers: list[LayerInfo],
    statistics: Mapping[str, Tensor],
    method: ScalingMethod,
    cap: float,
    bits: str,
    shifts: Mapping[str, Fold],
    threshold: float = 1.0,
) -> dict[str, ScalingResult]:
    """What the method chooses for every group, by owner; groups that it leaves alone have no entry.

    `network` is the float one; `statistics` hold what the method needs of `X.channel_range` by layer and of the
    trajectory (`statistics_for`), `shifts` are the groups whose input can be moved, by owner.

    Raises:
        UsageError: the method needs statistics, and these are of another network.
    """
    groups = scaling_groups(layers)

    def choose(owner: str, samples: Samples | None = None) -> ScalingResult:
        members = groups[owner]
        weights = [network.get_parameter(f"{member.name}.weight").detach() for member in members]
        lo, hi = beside(network, statistics.get(f"{owner}.channel_range", (None, None)))
        result = method(ScalingInput(weights, members[0].groups, lo, hi, cap, threshold, samples, owner in shifts))
        return replace(result, scale=main_memory(result.scale), shift=main_memory(result.shift))

    if method.needs_samples:
        found = _with_samples(network, family, groups, statistics, layers, parse_bits(bits), choose)
    else:
        found = {owner: choose(owner) for owner in groups}
    return {
        owner: result
        for owner, result in found.items()
        if method.learning_rate or result.shift is not None or bool((result.scale != 1).any())
    }


def statistics_for(method: ScalingMethod, stats: Artifact | None) -> Mapping[str, Tensor]:
    """What the method may look at of a calibrated artifact: its tensors, or nothing where it needs none.

    Raises:
        UsageError: it needs some and there is no artifact, or one of a network that was changed before.
    """
    if not method.needs_statistics:
        return {}
    if stats is None:
        raise UsageError(
            f"--scaling {method.name} looks at activations",
            where="--stats",
            fix="Name a calibrated artifact of this model: dilate with `none`, calibrate, then give it as --stats",
        )
    changes = {"folded_into"}
    if "scaling" not in stats.manifest.parameters:  # else calibrate itself moved inputs, and recorded them as they were
        changes.add("shifted_in")
    moved = [layer["name"] for layer in stats.manifest.layers if layer.get("scaling", {}).keys() & changes]
    if moved:
        raise UsageError(
            f"The activations of {len(moved)} layers, first {moved[0]}, were changed before they were recorded",
            where=f"--stats {stats.given}",
            fix="Calibrate after `dilate --scaling none`",
        )
    return stats.tensors()


def _with_samples(
    network: nn.Module,
    family: Family,
    groups: Groups,
    statistics: Mapping[str, Tensor],
    layers: list[LayerInfo],
    bits: LayerBits,
    choose: Callable[[str, Samples | None], ScalingResult],
) -> dict[str, ScalingResult]:
    """Run the float network over a few trajectory points and choose while each layer's inputs are at hand."""
    planned = {plan.info.name: plan.bits for plan in assign_bits(layers, bits)}
    trajectory = Trajectory.of(statistics)
    index, counts = _points(trajectory)
    points = trajectory.arguments(index)
    found: dict[str, ScalingResult] = {}
    with report.progress("dilate: comparing outputs", len(groups)) as progress:

        def see(layer: nn.Module, args: tuple[Tensor, ...], owner: str) -> None:
            if owner in found:
                return  # it runs several times: its first inputs stand for all
            if len(args[0]) % sum(counts):
                return  # it reads no sample (a class embedder of one row, say): it stays as it is
            products = [_product(network.get_submodule(member.name)) for member in groups[owner]]
            parts = list(args[0].split([n * (len(args[0]) // sum(counts)) for n in counts]))
            channel_dim = 1 if isinstance(layer, nn.Conv2d) else -1
            found[owner] = choose(owner, Samples(parts, products, planned[owner], channel_dim))
            progress.advance()

        handles = [
            network.get_submodule(owner).register_forward_pre_hook(partial(see, owner=owner)) for owner in groups
        ]
        try:
            with torch.no_grad():
                family.predict(network, *points)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _points(trajectory: Trajectory) -> tuple[Tensor, list[int]]:
    """A few of its samples, ordered by step: their indices, and how many each step has."""
    present = trajectory.rows.unique()  # some draws keep points of some steps only
    wanted = present[torch.linspace(0, len(present) - 1, min(STEPS, len(present))).round().long()]
    chosen = [(trajectory.rows == step).nonzero()[:PER_STEP, 0] for step in wanted.tolist()]
    return torch.cat(chosen), [len(part) for part in chosen]


def _product(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(layer, nn.Conv2d):
        geometry: dict[str, Any] = {
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        return lambda x, weight: F.conv2d(x, weight, None, **geometry)
    return lambda x, weight: F.linear(x, weight)

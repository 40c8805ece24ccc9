"""Work of a run of each stage, counted for `--dry-run` from its input's manifest: forward passes, layers, bytes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from dqtool.artifacts import Manifest, read_header, read_manifest
from dqtool.artifacts.jsonvalues import Json
from dqtool.artifacts.records import ParametersRecord
from dqtool.artifacts.schema import unchecked
from dqtool.stages.planning.packed_size import packed_size, prediction_rows_of, without_folds
from dqtool.stages.planning.records import PlannedLayer
from dqtool.stages.shared.settings import Execution

Work = dict[str, Json]

PROCESSES = (1, 2, 4, 8, 16)
"""Numbers of processes that a plan divides blocks among."""

BACKWARD_COST = 4
"""Cost of a backward pass of `sensitivity` in forward passes. It includes its forward pass, the gradients of weights, and
rounding of every operand at every width."""


def dilate_work(_: Execution, options: Any) -> Work:
    source = options.source()
    tensors = source.tensor_entries().values()
    return {
        "network": source.class_name,
        "weights": sum(prod(entry["shape"]) for entry in tensors),
        "tensors": len(tensors),
        "bytes": 4 * sum(prod(entry["shape"]) for entry in tensors),
    }


def calibrate_work(execution: Execution, options: Any) -> Work:
    if options.statistics is not None:
        return {"images": 0, "forwards": 2, "macs": 2 * _macs(read_manifest(execution.inputs[0].name))}
    images, forwards = _trajectory(_parameters(execution))
    return {
        "images": images,
        "forwards": forwards,
        "macs": forwards * _macs(read_manifest(execution.inputs[0].name)),
    }


def distill_work(execution: Execution, options: Any) -> Work:
    from dqtool.models.networks.packed import layer_infos
    from dqtool.nn.assignment import assign_bits, require_branches, with_branches
    from dqtool.scaling.records import dilated_layers
    from dqtool.stages.distill import network_spec, scheduler_of
    from dqtool.stages.options.distill import (
        AUTO,
        corrects_predictions,
        method_and_options,
        repair_iters_of,
        with_sampler_defaults,
    )

    calibrated = read_manifest(execution.inputs[0].name)
    options = with_sampler_defaults(options, str(scheduler_of(calibrated).get("_class_name")))
    plans = assign_bits(layer_infos(calibrated.layers), network_spec(options, calibrated), dilated_layers(calibrated))
    plans = without_folds(calibrated, with_branches(plans, options.low_rank))
    if options.bits != AUTO:  # its bits are chosen later, and others stand in for them here
        require_branches(plans, options.low_rank)
    steps = 1 if _parameters(execution).static else _timesteps(execution.inputs[0].name)
    blocks = [block.name for block in calibrated.metrics.blocks or ()]
    method, recipe = method_and_options(options)
    return {
        "blocks": len(blocks),
        "iterations": method.work(recipe, len(blocks)),
        **_sweeps(blocks, calibrated, repair_iters_of(options)),
        **packed_size(
            calibrated, plans, steps, prediction_rows_of(calibrated) if corrects_predictions(options) else {}
        ),
        "layers": [PlannedLayer.of(plan).to_json() for plan in plans],
    }


def _sweeps(blocks: Sequence[str], calibrated: Manifest, repair_iters: int | None) -> Work:
    """Return the repair that follows a sweep of all blocks at once, and the part of that sweep which the process with the most
    of it does, by the number of processes; nothing where blocks are trained in order alone."""
    if repair_iters is None:
        return {}
    from dqtool.training.assignment import block_macs, longest_share

    costs = block_macs(blocks, [(layer.name, layer.macs) for layer in calibrated.layers])
    shares: Work = {str(count): round(longest_share(costs, count), 3) for count in PROCESSES}
    return {"repair": f"{len(blocks)} x {repair_iters} in order", "first_sweep_by_processes": shares}


def sensitivity_work(execution: Execution, _: Any) -> Work:
    calibrated = read_manifest(execution.inputs[0].name)
    passes = _parameters(execution).passes or 0
    forwards = _trajectory(calibrated.parameters)[1] + (calibrated.parameters.samples or 0)
    return {
        "passes": passes,
        "macs": 3 * passes * _macs(calibrated),
        "seconds_about": round(BACKWARD_COST * passes * calibrated.seconds / max(1, forwards), 1),
    }


def export_work(execution: Execution, _: Any) -> Work:
    from dqtool.models.networks.packed import plans_of
    from dqtool.nn.prediction import NAME as PREDICTION

    prefix = f"{PREDICTION}."
    distilled = read_manifest(execution.inputs[0].name)
    format_name = _parameters(execution).format
    if format_name == "dense":
        return {"bytes": packed_size(distilled, [], 0)["bytes_float32"]}
    layers = [
        PlannedLayer(each.name, each.shape, each.bits, each.macs, low_rank=each.low_rank).to_json()
        for each in distilled.layers
    ]
    if format_name != "dq":  # other formats' files are not known to the byte beforehand
        return {"layers": layers}
    path = execution.inputs[0].name
    header = read_header(path)
    rows = {n.removeprefix(prefix): tuple(e["shape"][1:]) for n, e in header.items() if n.startswith(prefix)}
    return {**packed_size(distilled, plans_of(distilled), _timesteps(path), rows), "layers": layers}


def eval_work(execution: Execution, _: Any) -> Work:
    given = _parameters(execution)
    steps = given.steps or _calibrated_steps(execution)
    models, images = len(execution.inputs), given.samples or 0
    work: Work = {"networks": models, "images": images}
    return work if steps is None else {**work, "sampling": f"{steps} steps", "forwards": models * images * steps}


def sample_work(execution: Execution, options: Any) -> Work:
    steps = options.steps or _calibrated_steps(execution) or 0
    return {"sampling": f"{steps} steps", "forwards": options.number * steps}


def stats_work(_: Execution, options: Any) -> Work:
    from dqtool.stages.stats import image_source

    return {"images": len(image_source(options))}


def _parameters(execution: Execution) -> ParametersRecord:
    return unchecked(execution.parameters, ParametersRecord)


def _calibrated_steps(execution: Execution) -> int | None:
    sampling = read_manifest(execution.inputs[0].name).sampling
    return None if sampling is None else sampling.steps


def _trajectory(given: ParametersRecord) -> tuple[int, int]:
    """Return the images that a calibration samples, and its forward passes."""
    samples, steps = given.samples or 0, given.steps or 1
    images = -(-samples // steps)
    return images, images * steps + samples


def _timesteps(path: str) -> int:
    return int(read_header(path)["timesteps"]["shape"][0])


def _macs(manifest: Manifest) -> int:
    return sum(layer.macs for layer in manifest.layers)

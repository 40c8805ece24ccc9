"""`--dry-run`: what a stage would do, from what it resolved and what its input says. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from dqtool.artifacts import Manifest, read_header, read_manifest
from dqtool.errors import DqtoolError
from dqtool.models.sources import ModelSource
from dqtool.report import format_seconds, table_lines
from dqtool.stages.common import Common, Execution

__all__ = ["plan_recipe", "plan_stage", "render"]

Work = dict[str, Any]


def plan_stage(execution: Execution, options: Any) -> dict[str, Any]:
    """What a dry run of one stage with these options found: inputs, resolved parameters, whether it is cached, `work`.

    `work` holds counts; for distill and export also `layers` with their bits, the exact size of the file, `bytes`, and
    the bit operations of a forward pass, `bops`. `seconds_before` is how long the run took whose output would be replaced.
    """
    plan: dict[str, Any] = {
        "stage": execution.stage,
        "output": execution.output,
        "cached": execution.cached,
        "inputs": execution.inputs,
        "parameters": execution.parameters,
        "work": {} if execution.cached else _WORK[execution.stage](execution, options),
    }
    before = _standing(execution.output)
    if before is not None and before.stage == execution.stage and before.parameters == execution.parameters:
        plan["seconds_before"] = before.seconds
    return plan


def plan_recipe(path: str, overrides: Sequence[str], common: Common, directory: str | None = None) -> dict[str, Any]:
    """The stages of a recipe: those that are cached, the first one that is not as `plan_stage` gives it, the rest as
    named, with layers, size and bit operations forecast from the model's config."""
    from dqtool.stages.registry import make_options, stage_function
    from dqtool.stages.run import steps_of_recipe

    recipe, steps = steps_of_recipe(path, overrides, directory)
    dry = replace(common, dry_run=True, log=[])
    plans: list[dict[str, Any]] = []
    pending = False
    source: ModelSource | None = None
    steps_taken, sampler = 1, None
    for name, values in steps:
        steps_taken = values.get("steps") or steps_taken
        sampler = values.get("sampler") if name == "calibrate" else sampler
        # What a pending stage will write is not there to be looked at, nor is a directory that the run would make.
        if pending or not os.path.isdir(os.path.dirname(values["output"]) or "."):
            if name == "dilate":
                source = make_options(name, values).source()
            pending = True
            shown = {key: value for key, value in values.items() if key not in ("output", "artifact")}
            plan = {"stage": name, "output": values["output"], "cached": False, "parameters": shown}
            if name == "distill" and source is not None:
                plan["work"] = _forecast(source, values, steps_taken, sampler)
            plans.append(plan)
            continue
        options = make_options(name, values)
        if name == "dilate":
            source = options.source()
        stage_function(name)(options, dry)
        plans.append(plan_stage(dry.log[-1], options))
        pending = not plans[-1]["cached"]
    return {"recipe": path, "model": recipe.model, "stages": plans}


def _forecast(source: ModelSource, values: Mapping[str, Any], steps: int, sampler: str | None) -> Work:
    from dqtool.models.companions import companions_of_source
    from dqtool.models.families import family_of
    from dqtool.models.sampling import scheduler_class
    from dqtool.stages.distill import corrects, settled
    from dqtool.stages.forecast import forecast
    from dqtool.stages.registry import make_options

    options = settled(make_options("distill", values), scheduler_class(source.scheduler, sampler))
    companions = companions_of_source(source)
    family = family_of(source.class_name, str(source.config_path))
    config = source.config if companions is None else source.config | family.hints(companions)
    steps = 1 if options.static else steps
    return forecast(
        source.class_name,
        config,
        options.spec,
        steps,
        corrected=corrects(options),
    )


def render(plan: Mapping[str, Any]) -> list[str]:
    """The plan as lines of text."""
    if "stages" in plan:
        lines = [f"{plan['recipe']}: model {plan['model']}"]
        for stage in plan["stages"]:
            lines += ["", *render(stage)]
        return lines
    state = "cached, nothing to do" if plan["cached"] else "would write"
    lines = [f"{plan['stage']}: {state}: {plan['output']}"]
    work = plan.get("work", {})
    pairs = [("input", entry["name"]) for entry in plan.get("inputs", [])]
    pairs += [(key, value) for key, value in plan["parameters"].items() if value is not None and key != "output"]
    pairs += [(key, value) for key, value in work.items() if key != "layers"]
    if "seconds_before" in plan and not plan["cached"]:
        pairs.append(("time", f"{format_seconds(plan['seconds_before'])} for the run whose output stands there"))
    width = max((len(key) for key, _ in pairs), default=0)
    lines += [f"  {key.ljust(width)}  {_text(value)}" for key, value in pairs]
    if work.get("layers"):
        rows = [
            (layer["name"], "x".join(map(str, layer["shape"])), "/".join(map(str, layer["bits"])), f"{layer['macs']:,}")
            for layer in work["layers"]
        ]
        lines += table_lines(["layer", "weight", "bits", "MACs"], rows)
    return lines


def _dilate(_: Execution, options: Any) -> Work:
    source = options.source()
    tensors = source.tensor_entries().values()
    return {
        "network": source.class_name,
        "weights": sum(prod(entry["shape"]) for entry in tensors),
        "tensors": len(tensors),
        "bytes": 4 * sum(prod(entry["shape"]) for entry in tensors),
    }


def _calibrate(execution: Execution, _: Any) -> Work:
    given = execution.parameters
    images = -(-given["samples"] // given["steps"])
    forwards = images * given["steps"] + given["samples"]
    return {
        "images": images,
        "forwards": forwards,
        "macs": forwards * _macs(read_manifest(execution.inputs[0]["name"])),
    }


def _distill(execution: Execution, options: Any) -> Work:
    from dqtool.models.packed import layer_infos
    from dqtool.nn.assignment import assign_bits
    from dqtool.scaling.folding import pending_folds
    from dqtool.scaling.records import dilated_layers
    from dqtool.stages.distill import corrects, method_and_options, network_spec, scheduler_of, settled

    calibrated = read_manifest(execution.inputs[0]["name"])
    options = settled(options, str(scheduler_of(calibrated).get("_class_name")))
    given = execution.parameters
    folded = {name for found in pending_folds(calibrated) for name in found.layers}
    dilated = dilated_layers(calibrated) - folded
    plans = assign_bits(layer_infos(calibrated.layers), network_spec(options, calibrated), dilated)
    steps = 1 if given["static"] else _timesteps(execution.inputs[0]["name"])
    blocks = len(calibrated.metrics["blocks"])
    method, recipe = method_and_options(options)
    return {
        "blocks": blocks,
        "iterations": method.work(recipe, blocks),
        **_size(calibrated, plans, steps, _prediction_rows(calibrated) if corrects(options) else {}),
        "layers": [plan.summary() for plan in plans],
    }


def _export(execution: Execution, _: Any) -> Work:
    from dqtool.models.packed import plans_of
    from dqtool.nn.prediction import NAME as PREDICTION

    prefix = f"{PREDICTION}."
    distilled = read_manifest(execution.inputs[0]["name"])
    if execution.parameters["format"] == "dense":
        return {"bytes": _size(distilled, [], 0)["bytes_float32"]}
    keys = ("name", "shape", "bits", "macs")
    layers = [{key: layer[key] for key in keys} for layer in distilled.layers]
    if execution.parameters["format"] != "dq":  # other formats' files are not known to the byte beforehand
        return {"layers": layers}
    path = execution.inputs[0]["name"]
    header = read_header(path)
    rows = {n.removeprefix(prefix): tuple(e["shape"][1:]) for n, e in header.items() if n.startswith(prefix)}
    return {**_size(distilled, plans_of(distilled), _timesteps(path), rows), "layers": layers}


def _eval(execution: Execution, _: Any) -> Work:
    given = execution.parameters
    pipeline = read_manifest(execution.inputs[0]["name"]).pipeline or {}
    steps = given["steps"] or pipeline.get("sampling", {}).get("steps")
    models = len(execution.inputs)
    work = {"networks": models, "images": given["samples"]}
    return (
        work if steps is None else {**work, "sampling": f"{steps} steps", "forwards": models * given["samples"] * steps}
    )


def _sample(execution: Execution, options: Any) -> Work:
    steps = options.steps or (read_manifest(execution.inputs[0]["name"]).pipeline or {})["sampling"]["steps"]
    return {"sampling": f"{steps} steps", "forwards": options.number * steps}


def _stats(_: Execution, options: Any) -> Work:
    from dqtool.stages.stats import image_source

    return {"images": len(image_source(options))}


_WORK: dict[str, Callable[[Execution, Any], Work]] = {
    "dilate": _dilate,
    "calibrate": _calibrate,
    "distill": _distill,
    "export": _export,
    "eval": _eval,
    "sample": _sample,
    "stats": _stats,
}


def _prediction_rows(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """By name the shape of a row of each table that will correct the network's predictions."""
    from dqtool.models.families import family_of
    from dqtool.nn.prediction import row_shapes

    return row_shapes(family_of(manifest.model["class"], "manifest").prediction_row(manifest.model["config"]))


def _size(
    manifest: Manifest, plans: Sequence[Any], timesteps: int, prediction: Mapping[str, tuple[int, ...]] | None = None
) -> Work:
    """Bytes of the packed file and bit operations per forward pass, beside those of float32."""
    from dqtool.core.cost import bops, file_bytes
    from dqtool.models.families import family_of
    from dqtool.nn.surgery import state_shapes
    from dqtool.stages.export import network_shapes, swapped

    family = family_of(manifest.model["class"], "manifest")
    shapes = network_shapes(family, manifest.model["config"], manifest.layers)
    return {
        "bytes": file_bytes(swapped(state_shapes(shapes, plans, timesteps, prediction))),
        "bytes_float32": file_bytes(swapped(shapes)),
        "bops": bops(plan.summary() for plan in plans),
        "bops_float32": bops({"macs": layer["macs"], "bits": None} for layer in manifest.layers),
    }


def _timesteps(path: str) -> int:
    return int(read_header(path)["timesteps"]["shape"][0])


def _macs(manifest: Manifest) -> int:
    return sum(layer["macs"] for layer in manifest.layers)


def _standing(output: str) -> Manifest | None:
    try:
        return read_manifest(output)
    except DqtoolError:
        return None


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "-"
    return str(value)

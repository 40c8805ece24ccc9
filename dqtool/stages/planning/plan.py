"""`--dry-run`: what a stage would do, from what it resolved and what its input says. Writes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from dqtool.artifacts import Manifest, read_manifest
from dqtool.errors import DqtoolError
from dqtool.report import format_seconds, table_lines
from dqtool.stages.registry import make_options, stage_function, work_function
from dqtool.stages.shared.settings import Execution, RunSettings

if TYPE_CHECKING:
    from dqtool.stages.planning.network import PlannedNetwork

__all__ = ["plan_recipe", "plan_stage", "plan_steps", "render"]

Work = dict[str, Any]


def plan_stage(execution: Execution, options: Any) -> dict[str, Any]:
    """Return the plan of one stage with these options: inputs, all parameters, whether it is cached, and `work`.

    `work` holds counts; for distill and export also `layers` with their bits, the exact size of the file, `bytes`, and
    the bit operations of a forward pass, `bops`. `seconds_before` is how long the run took whose output would be replaced.
    """
    plan: dict[str, Any] = {
        "stage": execution.stage,
        "output": execution.output,
        "cached": execution.cached,
        "inputs": [entry.to_json() for entry in execution.inputs],
        "parameters": execution.parameters,
        "work": {} if execution.cached else work_function(execution.stage)(execution, options),
    }
    before = _standing(execution.output)
    if before is not None and before.stage == execution.stage and before.parameters.as_read == execution.parameters:
        plan["seconds_before"] = before.seconds
    return plan


def plan_recipe(
    path: str, overrides: Sequence[str], settings: RunSettings, directory: str | None = None
) -> dict[str, Any]:
    """Return the plan of a recipe, see `plan_steps`."""
    from dqtool.stages.run import steps_of_recipe

    recipe, steps = steps_of_recipe(path, overrides, directory)
    return {"recipe": path, "model": recipe.model, "stages": plan_steps(steps, settings)}


def plan_steps(steps: Sequence[tuple[str, dict[str, Any]]], settings: RunSettings) -> list[dict[str, Any]]:
    """Return the plans of stages that follow one another.

    Stages that are cached and the first that is not are planned by `plan_stage`. The rest are listed with their options,
    `distill` with layers, size and bit operations forecast from the model's config.
    """
    dry = replace(settings, dry_run=True, log=[])
    plans: list[dict[str, Any]] = []
    pending = False
    network: Callable[[], PlannedNetwork] | None = None
    steps_taken, sampler = 1, None
    for name, values in steps:
        steps_taken = values.get("steps") or steps_taken
        sampler = values.get("sampler") if name == "calibrate" else sampler
        if name == "dilate":
            network = cache(partial(_network, values))
        # The output of a pending stage is not there to be looked at, nor is a directory that the run would make.
        if pending or not os.path.isdir(os.path.dirname(values["output"]) or "."):
            if name == "dilate":
                make_options(name, values).source()
            elif name == "calibrate" and network is not None and not values.get("statistics"):
                _check_conditions(network(), values)
            pending = True
            shown = {key: value for key, value in values.items() if key not in ("output", "artifact")}
            plan = {"stage": name, "output": values["output"], "cached": False, "parameters": shown}
            if name == "distill" and network is not None:
                plan |= _forecast(network(), values, steps_taken, sampler)
            plans.append(plan)
            continue
        options = make_options(name, values)
        stage_function(name)(options, dry)
        plans.append(plan_stage(dry.log[-1], options))
        pending = not plans[-1]["cached"]
    return plans


def _network(values: Mapping[str, Any]) -> PlannedNetwork:
    """Return the network that the options of `dilate` name."""
    from dqtool.stages.planning.network import PlannedNetwork

    return PlannedNetwork.of(make_options("dilate", values))


def _check_conditions(network: PlannedNetwork, values: Mapping[str, Any]) -> None:
    """Raise `UsageError` where nothing makes the conditions that a network takes."""
    from dqtool.models.conditions.external import ConditionSource

    source = ConditionSource.of(make_options("calibrate", values))
    source.check_there(network.family, network.config, network.companions)


def _forecast(network: PlannedNetwork, values: Mapping[str, Any], steps: int, sampler: str | None) -> Work:
    """Return the entry `work` of the plan of `distill`; none for a network that does not run on shapes."""
    from dqtool.models.sampling.sampler import scheduler_class
    from dqtool.stages.options.distill import corrects_predictions, with_sampler_defaults

    options = with_sampler_defaults(make_options("distill", values), scheduler_class(network.source.scheduler, sampler))
    found = network.forecast(
        options.spec,
        1 if options.static else steps,
        corrected=corrects_predictions(options),
        low_rank=options.low_rank,
    )
    return {} if found is None else {"work": found.to_json()}


def render(plan: Mapping[str, Any]) -> list[str]:
    """Return the plan as lines of text."""
    if "stages" in plan:
        lines = [f"{plan['recipe']}: model {plan['model']}"]
        lines += [f"  effort  {plan['effort']}"] if "effort" in plan else []
        lines += [f"  {key}  {value}" for key, value in plan.get("estimate", {}).items()]
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
